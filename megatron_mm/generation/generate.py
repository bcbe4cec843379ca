"""Captions and answers from an exported folder or a training checkpoint.

Either becomes the exported modelling class of its system (`hf/modeling_*.py`), so there is one implementation of
generation, with its cache: a training checkpoint passes through the same list of names as an export, into memory. The
code is this package's own, or of a plugin that the user names; that of an exported folder does not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from megatron_mm.checkpoints.reader import CheckpointReader
from megatron_mm.config.load import load_saved_config
from megatron_mm.config.plugins import load_plugins
from megatron_mm.conversion.convert import (
    DTYPES,
    check_checkpoint,
    chosen_tokenizer,
    config_from_hf,
    find_checkpoint,
    hf_tensors,
    text_fields,
    tokenizer_of,
)
from megatron_mm.conversion.hf_folder import (
    FOREIGN_CODE,
    adapter_of_folder,
    is_hf_folder,
    read_json,
    release_fields,
    tokenizer_of_folder,
)
from megatron_mm.conversion.safetensors_stream import SafetensorsFolder
from megatron_mm.hf.processing_mm import MultimodalProcessor
from megatron_mm.systems.export import adapter_of, model_entries


@dataclass
class Decoding:
    """How tokens are chosen."""

    max_new_tokens: int = 64
    """Most tokens of one answer."""
    num_beams: int = 1
    """Beams of beam search; 1 is none."""
    top_p: float | None = None
    """Sample from the smallest set of tokens that holds this probability; none: the likeliest token."""
    temperature: float = 1.0
    """Divides logits before sampling."""
    seed: int = 0
    """Seed of sampling."""

    def arguments(self) -> dict[str, object]:
        """Arguments of `generate`.

        Raises:
            ValueError: a value out of its range, or sampling together with beams.
        """
        if self.max_new_tokens < 1 or self.num_beams < 1:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens} and num_beams {self.num_beams} must both be at least 1"
            )
        arguments: dict[str, object] = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        if self.top_p is not None:
            if not 0 < self.top_p <= 1 or self.temperature <= 0:
                raise ValueError(
                    f"top_p {self.top_p} must be above 0 and at most 1, temperature {self.temperature} above 0"
                )
            if self.num_beams > 1:
                raise ValueError(f"top_p samples and num_beams {self.num_beams} searches: choose one of them")
            arguments |= {"do_sample": True, "top_p": self.top_p, "temperature": self.temperature, "top_k": 0}
        return arguments | {"num_beams": self.num_beams}


class Generator:
    """A model and its processor, ready to answer prompts.

    A system may bring a processor of its own, which does what of `hf/processing_mm.py` is called here and by the
    evaluation: it is called with prompts, has a `tokenizer` and decodes.
    """

    def __init__(self, model: PreTrainedModel, processor: MultimodalProcessor):
        self.model, self.processor = model.eval(), processor

    @classmethod
    def from_path(
        cls,
        path: str | Path,
        dtype: str = "fp32",
        device: str = "cpu",
        tokenizer: str | Path | None = None,
        plugins: Sequence[str] = (),
    ) -> Generator:
        """Load an exported folder, or a training checkpoint (itself, a folder of them, or a run's output folder).

        Args:
            path: what to load.
            dtype: "fp32" or "bf16".
            device: torch device.
            tokenizer: a file that `open_tokenizer` reads; None: the one beside the weights.
            plugins: files or modules to import, of which one registers the system of the folder or checkpoint.

        Raises:
            ValueError: nothing to load there, or not whole, or no tokenizer of a model that reads text; a system that
                answers no prompts.
        """
        path = Path(path)
        plugins = load_plugins(plugins)
        if is_hf_folder(path):
            fields = _exported_fields(path / "config.json", plugins)
            adapter, tensors = adapter_of_folder(fields, path / "config.json"), _exported_tensors(path)
            beside = None if tokenizer else tokenizer_of_folder(fields, path)
            opened = chosen_tokenizer(adapter, tokenizer, beside)
        else:
            folder = find_checkpoint(path)
            recipe = load_saved_config(folder / "config.yaml")
            adapter, reader = adapter_of(recipe.model.system, folder / "config.yaml"), CheckpointReader(folder)
            check_checkpoint(model_entries(recipe.model), reader)
            opened = chosen_tokenizer(adapter, tokenizer, tokenizer_of(recipe, folder))
            fields = adapter.fields(recipe) | text_fields(adapter, recipe.model, opened, folder)
            tensors = hf_tensors(recipe.model, reader)
        if adapter.processor_class is None:
            raise ValueError(
                f"{path}: the system {adapter.name!r} has no processor of prompts (Adapter.processor_class), so it "
                "answers none; load its exported folder by AutoModel"
            )
        config = adapter.load_class(adapter.config_class)(**(fields | release_fields()))
        if opened is None and adapter.reads_tokenizer and getattr(config, "has_text", True):
            raise ValueError(f"{path}: holds no tokenizer; name one with --tokenizer")
        processor = adapter.load_class(adapter.processor_class)(config, opened)
        if processor.tokenizer is not None:  # folders exported before do not say it
            config.tokenizer_size = processor.tokenizer.vocab_size
        model = build_model(adapter.load_class(adapter.model_class), config, tensors, DTYPES[dtype], device)
        return cls(model, processor)

    def generate(
        self, prompts: list[dict], decoding: Decoding | None = None, batch_size: int = 8, progress: bool = False
    ) -> Iterator[str]:
        """Answers, in the order of the prompts.

        Args:
            prompts: dicts with "prompt" (text, optional) and lists of files "images", "audios", "videos".
            decoding: how tokens are chosen; None: greedily.
            batch_size: prompts handled at once.
            progress: show a progress bar.

        Raises:
            ValueError: a file is missing or does not decode (names it); the model does not generate text.
        """
        if not (self.model.can_generate() and getattr(self.model.config, "generates", True)):
            raise ValueError(f"{type(self.model).__name__} of this folder generates no text: it embeds and compares")
        decoding = decoding or Decoding()
        arguments = decoding.arguments()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        torch.manual_seed(decoding.seed)
        with tqdm(total=len(prompts), desc="generate", unit="prompt", disable=not progress) as bar:
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size]
                inputs = {key: value.to(self.model.device) for key, value in self.processor(batch).items()}
                arguments["max_new_tokens"] = self._new_tokens(inputs["attention_mask"], decoding.max_new_tokens)
                with torch.inference_mode():
                    out = self.model.generate(**inputs, **arguments)
                bar.update(len(batch))
                yield from self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :].tolist())

    def _new_tokens(self, attention_mask: torch.Tensor, wanted: int) -> int:
        """Tokens that an answer may have: those wanted, or as many as positions are left."""
        limit, prompt = getattr(self.model.config, "longest_text", None), int(attention_mask.sum(dim=1).max())
        if limit is None:
            return wanted
        if prompt >= limit:
            raise ValueError(f"a prompt has {prompt} tokens; this model has {limit} positions for prompt and answer")
        return min(wanted, limit - prompt)


def build_model(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: Iterator[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    device: str,
) -> PreTrainedModel:
    """A modelling class with given weights, each converted as it comes: no second copy of the model exists.

    Raises:
        ValueError: the class has other weights, or in other shapes, or a buffer that no file holds.
    """
    with torch.device("meta"):
        model = kind(config)
    known = set(model.state_dict())
    missing = set(known)
    for name, tensor in tensors:
        if name not in known:
            raise ValueError(f"{kind.__name__} has no {name}; its weights are, for example, {min(known)}")
        module, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module)
        if tuple(tensor.shape) != tuple(getattr(owner, leaf).shape):
            raise ValueError(f"{name} has shape {list(tensor.shape)}, the model {list(getattr(owner, leaf).shape)}")
        setattr(owner, leaf, torch.nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=False))
        missing.discard(name)
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, among them {min(missing)}")
    if buffers := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise ValueError(f"{kind.__name__} has the buffer {buffers[0]}, which no file holds; compute it in forward")
    return model


def _exported_fields(file: Path, plugins: Sequence[str]) -> dict:
    """A configuration as export writes it, without what is said of code and of the type of weights.

    Raises:
        ValueError: a field is missing, or its value is not of its type.
    """
    fields = read_json(file)
    config_from_hf(fields, file, plugins)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id", "tokenizer_size"):
        if not (fields.get(name) is None or (type(fields[name]) is int and fields[name] >= 0)):
            raise ValueError(f"{file}: {name} is {fields[name]!r}; it must be a number of the vocabulary")
    return {name: value for name, value in fields.items() if name not in FOREIGN_CODE | {"dtype", "torch_dtype"}}


def _exported_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    files = SafetensorsFolder(folder)
    for name in files.names:
        yield name, files.read(name)
