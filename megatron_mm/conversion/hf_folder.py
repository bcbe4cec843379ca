"""What an exported folder holds: its files, whose they are, and how its code is renewed.

    export ─ config.json, modelling files, tokenizer, README ─ beside the weights ─ folder ─ refresh ─ today's code

A folder is made under a temporary name and gets its own when it is whole, so a folder that exists is whole. What is
replaced is what export wrote: a folder of another program's is recognised by its configuration, and a file of the
user's by not being one that export writes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_mm import hf, media
from megatron_mm.config.documents import load_json
from megatron_mm.config.schema import Config
from megatron_mm.config.system import SystemConfig
from megatron_mm.config.systems import exported
from megatron_mm.conversion.safetensors_stream import INDEX
from megatron_mm.data.tokens.tokenizer import Tokenizer, kind_named, tokenizer_in
from megatron_mm.media.files import read_file
from megatron_mm.platform.atomic_files import give_name
from megatron_mm.systems.export import MEDIA, PLUGINS, Adapter, adapter_of, needed_plugins

#: Source of each code file of this package that export writes. transformers copies flat files only, so those of media
#: get a prefix.
CODE = {path.name: path for path in sorted(Path(hf.__file__).parent.glob("*.py"))} | {
    f"media_{module}.py": Path(media.__file__).parent / f"{module}.py" for module in MEDIA
}
#: Oldest and newest release of transformers in which folders were tried (tests/releases/run.sh).
TRANSFORMERS_RELEASES = ("5.0.0", "5.24.0")
#: Fields of a configuration by which transformers fetches code of others, such as kernels of attention; export writes
#: none of them, and nothing here reads them.
FOREIGN_CODE = frozenset(
    {"attn_implementation", "_attn_implementation", "experts_implementation", "quantization_config"}
)
#: Where refresh puts the code that it replaces, within the folder.
REPLACED = "replaced-code"

README = """# {name}

Exported by megatron_mm (tools/convert_checkpoint.py export). Needs {needs}.

    model = {auto}.from_pretrained(folder, trust_remote_code=True)
{use}"""
PROCESSES = """    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor([{prompt}])
    {use}
"""
GENERATES = 'print(processor.batch_decode(model.generate(**inputs)[:, inputs["input_ids"].shape[1]:]))'
EMBEDS = "print(model(**inputs))"
#: Of the processor that comes with this program, and of another.
PACKAGES = """{packages} and Pillow; for JPEG
images simplejpeg, for sounds soundfile and soxr, for videos av"""
OWN_PACKAGES = "{packages}, and what its files import"
PROMPT, OWN_PROMPT = '{"prompt": "<image>", "images": ["picture.png"]}', '{"prompt": "Once"}'


def read_json(path: Path) -> dict:
    """A JSON object; ValueError naming the file."""
    try:
        tree = load_json(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: missing; give the folder of a Hugging Face model") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: not a JSON object")
    return tree


def is_hf_folder(path: str | Path) -> bool:
    """Whether a folder looks like an exported model."""
    return (Path(path) / "config.json").exists()


def adapter_of_folder(fields: dict, source: Path) -> Adapter:
    """The adapter of an exported folder, from its config.json.

    Raises:
        ValueError: nothing that is known here exported it. The plugin that it needs is named, and not imported: a
            folder's word is no reason to run code.
    """
    name = fields.get("model_type")
    if name not in exported() and fields.get(PLUGINS):
        raise ValueError(
            f"{source}: its system {name!r} comes with a plugin of its recipe, {_listed(fields[PLUGINS])}; name that "
            "file or module with --plugins (it is code, which runs only where you name it)"
        )
    if name not in exported():
        raise ValueError(
            f"{source}: model_type is {name!r}, not one of {', '.join(exported())}; restore and refresh take folders "
            "that export wrote (import-pretrained takes others' models)"
        )
    return adapter_of(name, source)


def tokenizer_of_folder(fields: dict, folder: Path) -> Path | None:
    """The tokenizer that an exported folder holds; None where it has none.

    Args:
        fields: its config.json.

    Raises:
        ValueError: its kind comes with a plugin that nobody named; as `adapter_of_folder`.
    """
    found = tokenizer_in(folder)
    if found is None and fields.get(PLUGINS) and "tokenizer_size" in fields:
        raise ValueError(
            f"{folder}: the kind of its tokenizer comes with a plugin of its recipe, {_listed(fields[PLUGINS])}; name "
            "that file or module with --plugins (it is code, which runs only where you name it)"
        )
    return found


def _listed(plugins: object) -> str:
    """The plugins that a folder names, whatever stands there."""
    return ", ".join(map(str, plugins)) if isinstance(plugins, list) else str(plugins)


# ------------------------------------------------------------------------------------------------- whose files are they


def not_exported(folder: Path) -> str | None:
    """Why a folder is not, file by file, what export wrote, and must not be removed; None where it is."""
    try:
        fields = read_json(folder / "config.json")
        adapter = adapter_of_folder(fields, folder / "config.json")
    except ValueError as error:
        return str(error)
    known = fields.get("auto_map")
    if not isinstance(known, dict) or known.get("AutoConfig") != adapter.config_class:
        return f"{folder / 'config.json'} names no class of export's (auto_map)"
    names = {"config.json", "generation_config.json", "README.md", INDEX}
    names |= {*CODE, *adapter.files}  # of a folder of before: what its system no longer needs too
    try:
        if (tokenizer := tokenizer_of_folder(fields, folder)) is not None:
            names |= {tokenizer.name, *kind_named(tokenizer.name).exported_names}
    except ValueError as error:
        return str(error)
    for path in sorted(folder.iterdir()):
        shard = re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", path.name)
        if path.is_symlink() or not path.is_file() or not (shard or path.name in names):
            return f"export did not write {path}"
    readme = folder / "README.md"
    if readme.exists() and "Exported by megatron_mm" not in readme.read_text(encoding="utf-8", errors="replace"):
        return f"export did not write {readme} as it is"
    return None


@contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes otherwise.

    Only a folder that export wrote, with nothing of anyone else's in it, is ever replaced; it is set aside beside
    `path` while the new one gets its name.

    Raises:
        ValueError: `path` is empty or a root, or exists and holds something else.
    """
    if not str(path).strip() or str(path) == ".":  # what an unset variable of the caller's makes of a path
        raise ValueError(f"the output folder {str(path)!r} has no name of its own; give one such as exported")
    path = Path(path)
    if path.resolve() == Path(path.resolve().anchor):
        raise ValueError(f"{path} is a root folder; give one such as exported")
    replaces = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if replaces and not (overwrite and path.is_dir()):
        raise ValueError(
            f"{path}: exists and is not empty; choose another folder (--overwrite replaces an exported model only)"
        )
    if replaces and (why := not_exported(path)) is not None:
        raise ValueError(f"{path}: --overwrite replaces an exported model only, and {why}; move it or choose another")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.writing-{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
        aside = path.parent / f".{path.name}.replaced-{os.getpid()}"
        if give_name(temporary, path, aside):
            shutil.rmtree(aside, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise ValueError(f"{path}: not written: {error.strerror or error} (nothing was left behind)") from error
        raise


# ------------------------------------------------------------------------------------------------------------- writing


def write_json(path: Path, tree: dict) -> None:
    """A JSON object, indented."""
    path.write_text(json.dumps(tree, indent=2) + "\n")


def write_code(folder: Path, name: str, source: Path) -> None:
    """A code file of exported folders: its source, in which `from megatron_mm.media.NAME import` becomes
    `from .media_NAME import`. Nothing else changes, and nothing else of this package may be imported there."""
    code = source.read_text(encoding="utf-8")
    flat = re.sub(r"^(\s*from) megatron_mm\.media\.(\w+) import\b", r"\1 .media_\2 import", code, flags=re.MULTILINE)
    (folder / name).write_text(flat, encoding="utf-8")


def release_fields() -> dict:
    """What config.json says of transformers: the release here, and those in which such folders were tried."""
    import transformers

    tried = list(TRANSFORMERS_RELEASES)
    return {"transformers_version": transformers.__version__, "transformers_releases": tried}


def write_hf_files(
    folder: Path,
    adapter: Adapter,
    config: Config,
    text: dict[str, int],
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
) -> None:
    """Everything of an exported folder but the weights.

    Args:
        text: ids of special tokens and the size of the tokenizer, as `convert.text_fields` gives them.
        dtype: of the weights.
        tokenizer: None of a model that needs none.
    """
    architecture = adapter.model_class.partition(".")[2]
    head = {"architectures": [architecture], "model_type": adapter.name, "auto_map": adapter.auto_map(config.model)}
    tail = {"dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": False, **release_fields()}
    plugins = needed_plugins(config)
    fields = head | adapter.fields(config) | text | ({PLUGINS: plugins} if plugins else {}) | tail
    write_json(folder / "config.json", fields)
    if config.model.generates:
        ids = {name: fields.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        version = {"transformers_version": tail["transformers_version"]}
        write_json(folder / "generation_config.json", {"_from_model_config": True, **ids, **version})
    for name, source in adapter.files.items():
        write_code(folder, name, source)
    if tokenizer is not None:
        shutil.copyfile(tokenizer.path, folder / tokenizer.file_name)
        for name, content in tokenizer.exported_files().items():
            (folder / name).write_bytes(content)
    (folder / "README.md").write_text(_readme(adapter, tokenizer, architecture, config.model.generates))


def _readme(adapter: Adapter, tokenizer: Tokenizer | None, architecture: str, generates: bool) -> str:
    """How the folder is used."""
    ours = adapter.processor_class == Adapter.processor_class
    use, said = "", GENERATES if generates else EMBEDS
    if adapter.processor_class is not None:
        use = PROCESSES.format(prompt=PROMPT if ours else OWN_PROMPT, use=said)
    auto = "AutoModelForCausalLM" if generates else "AutoModel"
    packages = ", ".join(("transformers", *(() if tokenizer is None else tokenizer.packages)))
    needs = (PACKAGES if ours else OWN_PACKAGES).format(packages=packages)
    return README.format(name=architecture, needs=needs, auto=auto, use=use)


def link_what_runs(folder: Path, run: Path, adapter: Adapter, model: SystemConfig) -> None:
    """Puts into an empty folder what transformers may load of an exported one: code that is ours, and data.

    That is configuration, safetensors, and code that is byte for byte what export writes today. Whatever else the
    exported folder holds (a generate function, a PEFT adapter, pickled weights) is not there to be found.

    Raises:
        ValueError: a file of code, or what config.json says of code, is not what export writes.
    """
    fields = read_json(folder / "config.json")
    for name, wanted in {**dict.fromkeys(FOREIGN_CODE), "auto_map": adapter.auto_map(model)}.items():
        if fields.get(name) != wanted:
            raise ValueError(f"{folder / 'config.json'}: {name} is {fields.get(name)!r}; export writes {wanted!r}")
    for name, source in adapter.files.items():
        write_code(run, name, source)
        if read_file(folder / name) != (run / name).read_bytes():
            raise ValueError(f"{folder / name}: is not {source} as export writes it, so it does not run here")
    data = {"config.json", "generation_config.json", INDEX, *(path.name for path in folder.glob("*.safetensors"))}
    for name in data:
        if (folder / name).is_file():
            (run / name).symlink_to((folder / name).resolve())


# ----------------------------------------------------------------------------------------------------------- refreshing


def renew(
    folder: Path,
    adapter: Adapter,
    fields: dict,
    tokenizer: Tokenizer | None = None,
    check: Callable[[Path], None] | None = None,
) -> list[str]:
    """Puts today's modelling files and `fields` as config.json into an exported folder; all else stays as it is.

    A modelling file that changes is kept under `replaced-code/`: it may have been edited.

    Args:
        tokenizer: the folder's, whose files beside its own are renewed too.
        check: is given a folder with the new files beside links to the others before anything is replaced; what it
            raises leaves the folder as it was.

    Returns:
        Names of the files that were renewed.

    Raises:
        ValueError: the folder cannot be written.
    """
    folder = folder.resolve()
    made = folder.parent / f".{folder.name}.renewing-{os.getpid()}"
    try:
        made.mkdir()
        files, beside = adapter.files, {} if tokenizer is None else tokenizer.exported_files()
        code = [*files, *beside]
        new = [*code, "config.json"]  # the configuration last: until then the command can be given again
        for name, source in files.items():
            write_code(made, name, source)
        for name, content in beside.items():
            (made / name).write_bytes(content)
        write_json(made / "config.json", fields)
        for path in folder.iterdir():
            if path.name not in new:
                (made / path.name).symlink_to(path)
        if check is not None:
            check(made)
        changed = [n for n in new if not (folder / n).exists() or (folder / n).read_bytes() != (made / n).read_bytes()]
        for name in changed:
            if name in code and (folder / name).exists():
                (folder / REPLACED).mkdir(exist_ok=True)
                shutil.copyfile(folder / name, _unused(folder / REPLACED / name))
            give_name(made / name, folder / name)
    except OSError as error:
        raise ValueError(f"{folder}: not renewed: {error.strerror or error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return changed


def _unused(path: Path) -> Path:
    """`path`, or the first of path.1, path.2 … that does not exist."""
    found, number = path, 0
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}.{number}")
    return found
