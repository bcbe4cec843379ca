"""A user's own code: Python files or modules that register systems and kinds of tokenizers when they are imported.

Code runs from this package, and from what the user names: `plugins` and `data.builder` of the recipe that --config
names, and --plugins. What a checkpoint or a folder says of plugins is compared with what was named, and runs nothing.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

#: Files of a user's own code by the name of their module: plugins, and what they imported that no package brought.
_FILES: dict[str, Path] = {}
#: Plugins that the user has named, as a recipe may hold them, by the name of their file or module alone.
_NAMED: dict[str, str] = {}


def plugin_files() -> dict[str, Path]:
    """Files of the plugins that were loaded, and of what they imported of the user's own, by module."""
    return dict(_FILES)


@contextmanager
def _files_noted() -> Iterator[None]:
    """Notes what is imported meanwhile, apart from the standard library, installed packages and this one."""
    before = set(sys.modules)
    yield
    theirs = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "platstdlib")]
    theirs.append(Path(__file__).parent.parent)
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if not file or {"site-packages", "dist-packages"} & set(Path(file).parts):
            continue
        if not any(Path(file).resolve().is_relative_to(folder.resolve()) for folder in theirs):
            _FILES[name] = Path(file)


def locate_plugin(name: str, folder: Path) -> str:
    """A plugin's name such that it is found from the working directory, whichever folder its recipe is copied to."""
    path = folder / name
    if not name.endswith(".py") or Path(name).is_file() or not path.is_file():
        return name
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _own_name(name: str) -> str:
    """Of a file or module, wherever it is: what a checkpoint says of folders is another machine's."""
    return Path(name).stem if name.endswith(".py") else name.rpartition(".")[2]


def named_plugin(name: str) -> str | None:
    """The plugin that the user has named where a checkpoint says `name`; None: there is none.

    Args:
        name: a file in any folder, or a module.
    """
    return _NAMED.get(_own_name(name))


def load_plugin(name: str, folder: Path, field: str = "plugins") -> ModuleType:
    """Imports a plugin that the user has named, once.

    Args:
        name: path of a Python file (from the working directory, or from the recipe's folder), or a module's name.
        folder: of the recipe.
        field: of the recipe that names it, for messages.

    Raises:
        ValueError: there is no such file or module.
    """
    if not name.endswith(".py"):
        try:
            with _files_noted():
                module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(f"{field}: there is no module {name!r} ({error})") from None
        _NAMED[_own_name(name)] = name
        return module
    path = next((p.resolve() for p in (Path(name), folder / name) if p.is_file()), None)
    if path is None:
        raise ValueError(f"{field}: there is no file {name}, neither here nor in {folder}")
    folder_key = hashlib.blake2b(str(path.parent).encode(), digest_size=4).hexdigest()
    module_name = f"megatron_mm_plugin_{path.stem}_{folder_key}"  # another folder may have a file of the same name
    _NAMED[_own_name(name)] = str(path)
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    _FILES[name] = path
    try:
        with _files_noted():
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]  # what is half made must not be found later
        raise
    return module


def load_plugins(names: Sequence[str]) -> list[str]:
    """Imports what a user names by --plugins: his own systems and kinds of tokenizers are known then.

    Args:
        names: Python files, from the working directory, or names of modules.

    Returns:
        the names as a recipe may hold them.

    Raises:
        ValueError: there is no such file or module.
    """
    here = Path.cwd()
    for name in names:
        load_plugin(name, here, "--plugins")
    return [locate_plugin(name, here) for name in names]
