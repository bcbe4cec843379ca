"""Proof of an exported folder: it says the same with its cache, without it, and as the training model does.

    generated rows ─┬─ the folder's own code, in a process of its own ─ tokens, logits, embeddings ─┬─ equal, or refused
                    └─ training graph with the checkpoint's weights ─ streams ──────────────────────┘

A folder that transformers reads otherwise than it was meant answers all the same; here is where it is noticed. The
code that runs is the folder's where it is what export writes, byte for byte, and nothing else of the folder's. Inputs
are random rows in the format of the system (data/reading/generated.py), with and without media, of different lengths.

Shapes: R rows, T tokens.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch

from megatron_mm.checkpoints.reader import CheckpointReader
from megatron_mm.config.load import load_saved_config
from megatron_mm.config.schema import Config
from megatron_mm.conversion.convert import config_from_hf, find_checkpoint
from megatron_mm.conversion.hf_folder import adapter_of_folder, link_what_runs, read_json
from megatron_mm.conversion.safetensors_stream import SafetensorsFolder
from megatron_mm.data.reading.generated import GeneratedRows
from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.evaluation.streams import GraphReader
from megatron_mm.systems.export import Adapter, adapter_of, model_entries

#: Largest difference of values, as a share of the largest of them, where both sides have the same weights: fp32 sums in
#: other orders, through all layers.
SAME = 1e-4
#: The same where the folder's weights were rounded to bf16, or are an optimizer's fp32 where training computed in bf16.
ROUNDED = 0.1
NEW_TOKENS = 6
#: Tokens of the prompts: with and without media, every kind of row comes.
PROMPTS = (5, 2, 9, 4, 7, 3, 6, 8)
#: Fields of the exported model's output and the streams of the training graph that they are; a system's adapter may
#: add its own.
FIELDS = {
    "logits": "logits",
    "text_embeds": "text_embedding",
    "image_embeds": "image_embedding",
    "vision_embeds": "vision_embedding",
    "audio_embeds": "audio_embedding",
    "match_logits": "match_logits",
    "mae_prediction": "mae_prediction",
}


class NoRoom(Exception):
    """Not enough memory is free; says how much is needed."""


@dataclass(frozen=True)
class Rows:
    """Generated rows, as both sides read them."""

    batch: Microbatch
    lengths: torch.Tensor
    """Tokens of each row, [R]; of a prompt, where the model generates text."""
    generates: bool
    task: str

    @classmethod
    def of(cls, config: Config, generates: bool) -> Rows:
        """Rows of a recipe, of one document each.

        Args:
            generates: the model generates text; rows are short and leave room for NEW_TOKENS.
        """
        length = config.data.seq_length
        data = replace(
            config.data,
            seq_length=min(max(PROMPTS) + NEW_TOKENS, length) if generates else length,
            max_images_per_sample=min(2, config.data.max_images_per_sample),
            max_sounds_per_sample=min(1, config.data.max_sounds_per_sample),
        )
        inputs = config.model.inputs
        tasks = [name for name, _ in inputs.tasks]
        task = "generation" if "generation" in tasks else (tasks[0] if tasks else "")
        batch = GeneratedRows(replace(config, data=data), documents=1).microbatch(range(len(PROMPTS)), task=task)
        if not generates:
            return cls(batch, (batch.document_ids_RT >= 0).sum(dim=1), False, task)
        tokens_RT = torch.from_numpy(np.random.default_rng(0).integers(8, inputs.vocab_size, batch.tokens_RT.shape))
        tokens_RT[:, 0] = batch.tokens_RT[:, 0]  # the beginning of a document
        lengths = torch.tensor(PROMPTS).clamp(max=data.seq_length - NEW_TOKENS)
        return cls(replace(batch, tokens_RT=tokens_RT), lengths, True, task)

    @property
    def prompts(self) -> Microbatch:
        """The beginnings of the rows."""
        return self.begun(self.lengths, self.batch.tokens_RT)

    def answered(self, generated: torch.Tensor) -> Microbatch:
        """The beginnings, each followed by its generated tokens [R, NEW_TOKENS]."""
        tokens_RT = self.batch.tokens_RT.clone()
        for row, (first, answer) in enumerate(zip(self.lengths.tolist(), generated)):
            tokens_RT[row, first : first + NEW_TOKENS] = answer
        return self.begun(self.lengths + NEW_TOKENS, tokens_RT)

    def begun(self, lengths: torch.Tensor, tokens_RT: torch.Tensor) -> Microbatch:
        """The rows with other tokens, of which the first `lengths` [R] are real."""
        at_T = torch.arange(tokens_RT.shape[1])
        real_RT = at_T < lengths[:, None]
        return replace(
            self.batch,
            plan=replace(self.batch.plan, one_document_per_row=True, max_document_length=len(at_T)),
            tokens_RT=tokens_RT * real_RT,
            document_ids_RT=torch.where(real_RT, 0, -1),
            position_ids_RT=at_T.expand_as(real_RT),
        )


def exported_inputs(batch: Microbatch, left: bool = True) -> dict[str, torch.Tensor]:
    """Rows of one document as the exported model reads them.

    A field of a system's own is read by its name without the dimensions: `weights_RT` as `weights`, padded as tokens
    are; `pulses_SNC` as `pulses`, in the slots of rows, with `pulse_mask`, which slots are filled.

    Args:
        batch: as training reads them, padded on the right.
        left: pad on the left.
    """
    real = batch.document_ids_RT >= 0
    lengths = real.sum(dim=1).tolist()

    def padded(values_RT: torch.Tensor) -> torch.Tensor:
        if not left:
            return values_RT
        rolled = torch.stack([row.roll(-count, dims=0) for row, count in zip(values_RT, lengths)])
        return rolled[:, -max(lengths) :]

    inputs = {}
    if batch.tokens_RT is not None:
        inputs = {"input_ids": padded(batch.tokens_RT), "attention_mask": padded(real.long())}
    lists = {"I": "image", "A": "sound"} | {own.listed.letter: own.listed.name for own in batch.plan.own_lists}
    for name in sorted(batch.own.keys() & batch.tensors.keys() - batch.plan.always_read):
        key, _, letters = name.rpartition("_")
        if letters[0] == "R":
            inputs[key] = padded(batch.own[name]) if letters[:2] == "RT" else batch.own[name]
        else:
            slots, _ = batch.slots(lists[letters[0]])
            inputs |= {key: _in_slots(batch.own[name], slots), f"{lists[letters[0]]}_mask": slots >= 0}
    if batch.sounds_AMF is not None:  # packed rows have slots
        slots = batch.image_slots_RK
        frames = batch.image_frames_I[slots.clamp(min=0)].masked_fill(slots < 0, -1)
        return inputs | {
            "pixel_values": _in_slots(batch.images_ICHW, slots),
            "image_mask": slots >= 0,
            "image_frames": frames,
            "input_features": _in_slots(batch.sounds_AMF, batch.sound_slots_RJ),
            "sound_mask": batch.sound_slots_RJ >= 0,
        }
    images, sounds = batch.image_slots_RK[:, 0], batch.sound_slots_RJ[:, 0]
    if batch.images_ICHW is not None:
        inputs |= {"pixel_values": _in_slots(batch.images_ICHW, images), "image_mask": images >= 0}
    if batch.clips_VFCHW is not None:
        clips = batch.clip_slots_R
        inputs |= {"pixel_values_videos": _in_slots(batch.clips_VFCHW, clips), "video_mask": clips >= 0}
    if batch.waveforms_AN is not None:
        inputs |= {"input_values": _in_slots(batch.waveforms_AN, sounds), "sound_mask": sounds >= 0}
    if batch.patch_noise_IP is not None:
        inputs["patch_noise"] = _in_slots(batch.patch_noise_IP, images)
    return inputs


def _in_slots(values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Media listed once [I, …] as rows or slots [*slots, …] have them, zero where there is none."""
    out = values.new_zeros(*slots.shape, *values.shape[1:])
    out[slots >= 0] = values[slots[slots >= 0]]
    return out


# ----------------------------------------------------------------------------------------------------------- the proof


def proof(checkpoint: str | Path | None = None) -> Callable[[Path], None]:
    """`prove` as the `check` of `convert.export` and `convert.refresh`; prints what was proved.

    Args:
        checkpoint: what is exported; None: the folder is compared with itself alone.
    """

    def check(folder: Path) -> None:
        print(f"proof: {prove(folder, checkpoint)}", flush=True)

    return check


def prove(folder: Path, checkpoint: str | Path | None = None) -> str:
    """Runs an exported folder and compares what it says.

    Args:
        folder: the exported folder.
        checkpoint: the training checkpoint that it was made of; None: the folder is compared with itself alone.

    Returns:
        A sentence on what was compared, and on what was not and why.

    Raises:
        ValueError: the folder does not load, or says something else without its cache or than the training model; its
            code is not what export writes, and does not run.
    """
    fields = read_json(folder / "config.json")
    adapter = adapter_of_folder(fields, folder / "config.json")
    recipe = load_saved_config(find_checkpoint(checkpoint) / "config.yaml") if checkpoint is not None else None
    config = recipe or config_from_hf(fields, folder / "config.json")
    hf_inputs = getattr(adapter.load_class(adapter.config_class)(**fields), "inputs", {})
    rows = Rows.of(config, config.model.generates)
    source = SafetensorsFolder(folder)
    numbers = sum(torch.Size(source.shape(name)).numel() for name in source.names)
    try:
        _room_for(4 * numbers, "the exported model")
    except NoRoom as error:
        return f"the exported model was not run: {error}"
    asked = questions(config, rows, hf_inputs.get("padding_side", "left") == "left")
    if not any(names for names in (asked["answered"], *(names for _, names in asked["calls"]))):
        known = ", ".join(compared(adapter))
        raise ValueError(
            f"nothing of {adapter.name} can be compared: its graph writes none of the streams of {known}; name fields "
            "of its output and their streams in Adapter.outputs, or leave the proof out (--no-prove)"
        )
    with tempfile.TemporaryDirectory(prefix="megatron_mm-proof-") as work:
        link_what_runs(folder, Path(work), adapter, config.model)
        said = _run(Path(work), asked)
    wanted = {name for names in (asked["answered"], *(names for _, names in asked["calls"])) for name in names}
    if lacking := sorted(wanted - said["fields"].keys()):
        raise ValueError(f"the exported model's output lacks {', '.join(lacking)}, which the training model computes")
    for name, value in said["fields"].items():
        if not value.isfinite().all():
            raise ValueError(f"{name} of the exported model is not finite")
    ways = []
    if rows.generates:
        _compare_tokens(said)
        ways = ["with its cache", "without it"]
    if recipe is None:
        return _sentence(said, ways)
    try:
        _room_for(10 * numbers, "the training model")  # weights, and buffers of gradients
    except NoRoom as error:
        return f"{_sentence(said, ways)}; not compared with the training model: {error}"
    trained = find_checkpoint(checkpoint)
    stored = CheckpointReader(trained).dtype(model_entries(recipe.model)[-1].training)
    tolerance = SAME if stored == source.dtype(source.names[-1]) else ROUNDED
    worst = _compare_streams(recipe, trained, rows, said, tolerance)
    return f"{_sentence(said, [*ways, 'by the training model'])} (values within {worst:.1e} of the largest)"


def compared(adapter: Adapter) -> dict[str, str]:
    """Fields of an exported model's output and the streams of its graph that they are, where it has them."""
    return FIELDS | dict(adapter.outputs)


def _sentence(said: dict, ways: Sequence[str]) -> str:
    if said["cached"] is None:
        fields = ", ".join(said["fields"])
        return f"{fields} of {len(PROMPTS)} rows agree with the training model's" if ways else f"{fields} are finite"
    *first, last = ways
    return f"{said['cached'].numel()} tokens, generated {', '.join(first)} and {last}, agree"


def _room_for(needed: int, what: str) -> None:
    free = psutil.virtual_memory().available
    if 1.2 * needed > free:
        raise NoRoom(f"{what} takes about {1.2 * needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free")


def questions(config: Config, rows: Rows, left: bool) -> dict:
    """INPUTS of run_exported.py.

    Args:
        left: rows are padded on the left.
    """
    from megatron_mm.models.layers.settings import LayerSettings  # megatron-core's, which the platform comes before
    from megatron_mm.systems.graph import build_graph

    streams = build_graph(config.model, LayerSettings()).streams
    of_stream = compared(adapter_of(config.model.system, "the recipe"))
    names = [name for name, stream in of_stream.items() if stream in streams]
    if rows.generates:
        prompts = exported_inputs(rows.prompts, left)
        prompts.pop("patch_noise", None)
        return {
            "prompts": prompts,
            "new_tokens": NEW_TOKENS,
            "answered": [name for name in names if name != "mae_prediction"],
            "calls": [],
        }
    calls = [(exported_inputs(rows.batch, left), [name for name in names if name != "logits"])]
    if "logits" in names:  # of texts in which some tokens are hidden
        masked = exported_inputs(replace(rows.batch, tokens_RT=rows.batch.masked_tokens_RT), left)
        calls.append((masked | ({"bidirectional": True} if rows.task else {}), ["logits"]))
    return {"prompts": None, "new_tokens": 0, "answered": [], "calls": calls}


def _run(folder: Path, questions: dict) -> dict:
    """OUTPUTS of run_exported.py; ValueError with the last line that it said."""
    with tempfile.TemporaryDirectory(prefix="megatron_mm-proof-") as work:
        given, found = Path(work) / "inputs.pt", Path(work) / "outputs.pt"
        torch.save(questions, given)
        # Modules of the folder are copied to a place of their own, not beside those of the user's models.
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(work) / "modules"), "HF_HUB_OFFLINE": "1"}
        environment["PYTHONSAFEPATH"] = "1"  # nor is anything imported from the folder of run_exported.py
        command = [sys.executable, Path(__file__).with_name("run_exported.py"), folder, given, found]
        done = subprocess.run([str(word) for word in command], capture_output=True, encoding="utf-8", env=environment)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
            raise ValueError(f"transformers cannot use the exported model: {lines[-1]}")
        return torch.load(found, weights_only=True)


def _compare_tokens(said: dict) -> None:
    """Refuses a model that says something else without its cache; where two tokens are equally likely it may."""
    cached, uncached = said["cached"], said["uncached"]
    for row in (cached != uncached).any(dim=1).nonzero().flatten().tolist():
        place = int((cached[row] != uncached[row]).nonzero()[0])
        if said["margins"][row, place] > SAME * said["fields"]["logits"].abs().max():
            raise ValueError(
                f"the exported model generates {cached[row].tolist()} with its cache and {uncached[row].tolist()} "
                f"without it (row {row}, from token {place} on)"
            )


def _compare_streams(recipe: Config, checkpoint: Path, rows: Rows, said: dict, tolerance: float) -> float:
    """The largest difference of any field from training's, as a share of the field's largest value.

    Raises:
        ValueError: it is above the tolerance.
    """
    reader = exact_reader(recipe, checkpoint)
    batch = rows.answered(said["cached"]) if rows.generates else rows.batch
    worst = 0.0
    for name, (wanted, chosen) in training_fields(reader, batch, list(said["fields"])).items():
        found = said["fields"][name][said["mask"].bool() if chosen is None else chosen].float()
        share = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)) if wanted.numel() else 0.0
        if not share <= tolerance:
            raise ValueError(
                f"{name} of the exported model differ from the training model's by {share:.1e} of their largest value; "
                f"at most {tolerance:g} is rounding"
            )
        worst = max(worst, share)
    return worst


def exact_reader(recipe: Config, checkpoint: Path) -> GraphReader:
    """The training model of a checkpoint, computing in fp32 whatever it trained in."""
    training, model = replace(recipe.training, precision="fp32"), replace(recipe.model, backend="local")
    return GraphReader(replace(recipe, training=training, model=model), checkpoint)


def training_fields(
    reader: GraphReader, batch: Microbatch, names: Sequence[str]
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """What the training model says of rows, for each of FIELDS that is named.

    Returns:
        by name: values of the rows that have what the field is of (of a system's own field: all rows), and which rows
        [R] these are; None of `logits`, which are of all real tokens, in the order of rows.
    """
    of_stream = compared(adapter_of(reader.config.model.system, "the recipe"))
    streams, _ = reader.run(batch, [of_stream[name] for name in names])
    images, sounds = batch.image_slots_RK[:, 0] >= 0, batch.sound_slots_RJ[:, 0] >= 0
    seen = images if batch.clip_slots_R is None else images | (batch.clip_slots_R >= 0)
    of_media = {"image_embeds": images, "vision_embeds": seen, "audio_embeds": sounds, "mae_prediction": images}
    fields = {}
    for name in names:
        value, chosen = streams[of_stream[name]].float().cpu(), of_media.get(name, torch.ones_like(images))
        if name == "logits":
            real_RT = batch.document_ids_RT >= 0
            fields[name] = value.view(*real_RT.shape, -1)[real_RT], None
        elif name == "match_logits":  # a row's own pair; the others are of wrong ones
            fields[name] = value.chunk(3)[0][chosen], chosen
        else:
            of_images = name == "mae_prediction"  # one for each image, not for each row
            if not of_images and len(value) != len(chosen):
                raise ValueError(f"the stream {of_stream[name]}, {list(value.shape)}, has not one value for each row")
            fields[name] = value[batch.image_slots_RK[chosen, 0] if of_images else chosen], chosen
    return fields
