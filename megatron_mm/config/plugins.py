"""A user's own code, named by a recipe: Python files or modules that register systems when they are imported."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def locate_plugin(name: str, folder: Path) -> str:
    """A plugin's name such that it is found from the working directory, whichever folder its recipe is copied to."""
    path = folder / name
    if not name.endswith(".py") or Path(name).is_file() or not path.is_file():
        return name
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def load_plugin(name: str, folder: Path, field: str = "plugins") -> ModuleType:
    """Imports a plugin once.

    Args:
        name: path of a Python file (from the working directory, or from the recipe's folder), or a module's name.
        folder: of the recipe.
        field: of the recipe that names it, for messages.

    Raises:
        ValueError: there is no such file or module.
    """
    if not name.endswith(".py"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(f"{field}: there is no module {name!r} ({error})") from None
    path = next((p.resolve() for p in (Path(name), folder / name) if p.is_file()), None)
    if path is None:
        raise ValueError(f"{field}: there is no file {name}, neither here nor in {folder}")
    folder_key = hashlib.blake2b(str(path.parent).encode(), digest_size=4).hexdigest()
    module_name = f"megatron_mm_plugin_{path.stem}_{folder_key}"  # another folder may have a file of the same name
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]  # what is half made must not be found later
        raise
    return module
