"""One training step of a recipe against the same model in plain torch, interleaved in one process.

    python benchmarks/train_step.py [--threads 2] [--json FILE]

Ours: the path of pretrain_multimodal.py (megatron-core layers, DDP, schedule, optimizer). Plain: the modelling file of
an export with torch.optim.AdamW (fused or foreach, whichever is faster here), the same weights, weight-decay groups
and clipping. Both take the same microbatch, already in memory: forward, backward, AdamW. The first losses must agree,
or the comparison would not be one. Prints the medians and the median of the ratios of neighbouring steps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_mm.config import outputs
from megatron_mm.platform.atomic_files import write_figures

LIMIT = 1.15


@dataclass
class Arguments:
    """What to measure."""

    config: Path = Path(__file__).parents[1] / "megatron_mm" / "recipes" / "synapse-tiny.yaml"
    """Recipe."""
    rows: int = 8
    """Rows of the microbatch."""
    tokens: int = 256
    """Tokens of a row."""
    images: int = 2
    """Images of each row."""
    sounds: int = 1
    """Sounds of each row."""
    steps: int = 15
    """Steps of each side that are measured."""
    threads: int = 2
    """Threads of torch."""
    json: Path | None = None
    """File for the figures."""
    smoke: bool = False
    """A few steps of a small microbatch, to see that it runs; the ratio means nothing then."""


def make_inputs(config, arguments: Arguments):
    """The same random rows, one document each, for both sides: (training microbatch, plain torch arguments)."""
    import torch

    from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan

    rows, length, generator = arguments.rows, arguments.tokens, torch.Generator().manual_seed(0)
    vision, audio = config.model.vision, config.model.audio
    tokens = torch.randint(8, config.model.decoder.vocab_size, (rows, length), generator=generator)
    size = vision.image_size
    pixels = torch.randn(rows, arguments.images, 3, size, size, generator=generator)
    mels = torch.randn(rows, arguments.sounds, audio.num_mel_bins, audio.num_frames, generator=generator)
    labels, mask = tokens.roll(-1, dims=1), torch.ones(rows, length)
    mask[:, -1] = 0

    def slots(count: int) -> tuple:
        return torch.arange(rows * count).view(rows, count), torch.zeros(rows, count, dtype=torch.long)

    image_slots, sound_slots = slots(arguments.images), slots(arguments.sounds)
    plan = MicrobatchPlan(
        num_rows=rows, row_length=length, num_images=rows * arguments.images, num_sounds=rows * arguments.sounds,
        image_slots=arguments.images, sound_slots=arguments.sounds, one_document_per_row=True,
        max_document_length=length,
    )  # fmt: skip
    ours = Microbatch(
        plan=plan, document_ids_RT=torch.zeros(rows, length, dtype=torch.long),
        position_ids_RT=torch.arange(length).repeat(rows, 1), loss_mask_RT=mask, image_slots_RK=image_slots[0],
        image_slot_documents_RK=image_slots[1], sound_slots_RJ=sound_slots[0], sound_slot_documents_RJ=sound_slots[1],
        tokens_RT=tokens, labels_RT=labels, images_ICHW=pixels.flatten(0, 1),
        image_frames_I=torch.full((rows * arguments.images,), -1), sounds_AMF=mels.flatten(0, 1),
    )  # fmt: skip
    return ours, {"input_ids": tokens, "pixel_values": pixels, "input_features": mels, "labels": tokens}


def our_step(config, batch) -> tuple[Callable[[], float], dict]:
    """A step of the training path (returns the loss), and its initial weights by training name."""
    from megatron_mm.config.sizes import ParallelSizes
    from megatron_mm.pipeline.schedule import run_batch
    from megatron_mm.planner.assembly import Assembly
    from megatron_mm.platform import setup
    from megatron_mm.training.optimizer import Optimizer

    sizes = ParallelSizes()
    device = setup.initialize(sizes, config.training.seed)
    pipeline = Assembly.of(config, sizes, device.type).build(device, config.training.seed)
    optimizer = Optimizer(config, pipeline)
    weights = {
        f"{node.name}.{name}": parameter.detach().clone()
        for chunk in pipeline.bare_chunks
        for node, module in zip(chunk.nodes, chunk.node_modules)
        for name, parameter in module.named_parameters()
    }

    def step() -> float:
        optimizer.zero_grad()
        result = run_batch(pipeline, [batch])
        optimizer.step(optimizer.gradient_norm(), samples=config.training.global_batch_size)
        return result.total

    return step, weights


def plain_step(config, weights: dict, inputs: dict, fused: bool) -> Callable[[], float]:
    """A step of the modelling file and torch's AdamW (returns the loss)."""
    import torch

    from megatron_mm.hf.configuration_synapse import SynapseConfig
    from megatron_mm.hf.modeling_synapse import SynapseForCausalLM
    from megatron_mm.systems.export import model_entries
    from megatron_mm.systems.synapse.export import fields

    model = SynapseForCausalLM(SynapseConfig(**fields(config))).train()
    entries = model_entries(config.model)
    model.load_state_dict(dict(pair for entry in entries for pair in entry.split(weights[entry.training])))
    for name, parameter in model.named_parameters():
        vision = "vision_tower" in name and "temporal" not in name
        parameter.requires_grad = not (
            (vision and config.model.vision.frozen) or ("audio_tower" in name and config.model.audio.frozen)
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    settings = config.optimizer
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(
        groups, lr=settings.lr / max(1, settings.lr_warmup_iters), betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps, fused=fused, foreach=not fused,
    )  # fmt: skip

    def step() -> float:
        adam.zero_grad(set_to_none=True)
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        if settings.clip_grad > 0:
            torch.nn.utils.clip_grad_norm_(trained, settings.clip_grad)
        adam.step()
        return loss.item()

    return step


def seconds(step: Callable[[], float]) -> float:
    """Wall time of one step."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def median(values: list[float]) -> float:
    """The middle value."""
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def main() -> int:
    """Measure; 1 if the sides disagree, or the ratio is above the limit."""
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        outputs.check_file(arguments.json, "--json", outputs.figures("ours_ms"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.smoke:
        arguments.rows, arguments.tokens, arguments.steps = 2, 64, 2
    import torch

    from megatron_mm.config.load import load_config
    from megatron_mm.config.section import changed

    torch.set_num_threads(arguments.threads)
    try:
        config = load_config(arguments.config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = {f"training.{name}_batch_size": arguments.rows for name in ("micro", "global")}
    config = changed(config, {**rows, "training.precision": "fp32", "data.seq_length": arguments.tokens})
    batch, inputs = make_inputs(config, arguments)
    ours, weights = our_step(config, batch)
    sides = {"fused": plain_step(config, weights, inputs, True), "foreach": plain_step(config, weights, inputs, False)}
    losses = {"ours": [ours() for _ in range(2)]} | {name: [step() for _ in range(2)] for name, step in sides.items()}
    for name in sides:
        if any(abs(a - b) > 2e-4 * abs(a) for a, b in zip(losses["ours"], losses[name])):
            print(f"error: not the same training: losses {losses['ours']} against {losses[name]}", file=sys.stderr)
            return 1
    trial = {name: median([seconds(step) for _ in range(3)]) for name, step in sides.items()}
    adam = min(trial, key=trial.get)
    pairs = [(seconds(ours), seconds(sides[adam])) for _ in range(arguments.steps)]
    figures = {
        "ours_ms": 1e3 * median([a for a, _ in pairs]),
        "plain_ms": 1e3 * median([b for _, b in pairs]),
        "ratio": median([a / b for a, b in pairs]),
        "limit": LIMIT,
        "plain_adam": adam,
        "rows": arguments.rows,
        "tokens": arguments.tokens,
        "threads": arguments.threads,
    }
    print(f"training step, {arguments.rows} × {arguments.tokens} tokens, {arguments.images} images and "
          f"{arguments.sounds} sounds a row, {arguments.threads} threads")  # fmt: skip
    print(f"  megatron_mm  {figures['ours_ms']:8.1f} ms")
    print(f"  plain torch  {figures['plain_ms']:8.1f} ms  (AdamW {adam})")
    print(f"  ratio        {figures['ratio']:8.3f}  (limit {LIMIT})")
    write_figures(arguments.json, figures)
    return 0 if arguments.smoke or figures["ratio"] <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
