"""The full-size recipes against the documents: stated values, parameters part by part, balance of the pipelines."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

from megatron_mm.config.load import RECIPES, load_config
from megatron_mm.config.schema import Config
from megatron_mm.config.section import changed
from megatron_mm.config.validate import check, parallel_sizes
from megatron_mm.models.graph import Graph
from megatron_mm.planner.assembly import Assembly, full_plan
from megatron_mm.platform import setup
from tests.support.balance import slowest_over_mean
from tests.support.full_recipes import PHASES, launched

IMAGENET = {"data.image_mean": (0.485, 0.456, 0.406), "data.image_std": (0.229, 0.224, 0.225)}
#: What the systems' documents state.
STATED = {
    "avt-33b": {
        "model.decoder.num_layers": 48,
        "data.seq_length": 2048,
        "model.vision.image_size": 224,
        "data.random_crop": False,
        "model.audio.sample_rate": 16000,
        "parallel.world_size": 128,
        "training.global_batch_size": 2048,
        "training.precision": "bf16",
        "optimizer.lr": 1.5e-4,
        "optimizer.lr_warmup_iters": 5000,
    },
    "vlm-14b": {
        "parallel.world_size": 32,
        "data.seq_length": 768,
        "model.vision.image_size": 224,
        "data.random_crop": False,
        "model.contrastive_weight": 0.5,
        "model.causal_lm_weight": 0.5,
        "training.global_batch_size": 2048,
        "optimizer.lr": 5e-5,
        "optimizer.min_lr": 1e-6,
        "optimizer.lr_warmup_iters": 10000,
        "optimizer.clip_grad": 1.0,
        **IMAGENET,
    },
    "perceiver-fusion-xl": {
        "parallel.world_size": 64,
        "data.seq_length": 256,
        "model.vision.image_size": 224,
        "data.random_crop": False,
        "training.global_batch_size": 2048,
        "training.precision": "bf16",
        "optimizer.adam_beta1": 0.9,
        "optimizer.adam_beta2": 0.95,
        "optimizer.weight_decay": 0.1,
        "optimizer.lr": 1e-4,
        "optimizer.min_lr": 1e-6,
        "optimizer.lr_warmup_iters": 5000,
        "optimizer.clip_grad": 1.0,
    },
    "dual-encoder": {
        "parallel.world_size": 64,
        "data.seq_length": 77,
        "model.vision.image_size": 224,
        "training.global_batch_size": 2048,
        "training.precision": "bf16",
        "optimizer.min_lr": 1e-6,
        "optimizer.lr_warmup_iters": 2000,
        "optimizer.clip_grad": 1.0,
        "model.text.max_positions": 77,
        "data.random_crop": True,
        "data.horizontal_flip": 0.5,
        "data.color_jitter": 0.4,
    },
}
#: Vocabularies are stated before they are padded to a multiple of 1024.
VOCABULARIES = {"avt-33b": None, "vlm-14b": 50_000, "perceiver-fusion-xl": 50_000, "dual-encoder": 32_000}
#: Mini-batches of a step, in both phases.
ACCUMULATED = {"vlm-14b": 8, "dual-encoder": 8}
#: Billions of parameters: stated totals, then parts (prefixes of nodes) as stated or as the reference sizes give them.
#: Cross-attention layers project keys and values from the tower's width, so the VLM's are smaller than 8 x 0.315B.
BILLIONS = {
    "avt-33b": (32.7, {"vision": 2.998, "audio": 1.820, "fusion.layers": 4.161, "decoder.layers": 22.952}),
    "vlm-14b": (13.7, {"vision": 0.631, "decoder.layers": 10.067, "decoder.cross_layers": 2.454}),
    "perceiver-fusion-xl": (35.0, {"vision": 18.0, "text": 12.0, "perceiver.blocks": 4.867}),
    "synapse-70b": (70.0, {"decoder.layers": 66.439, "decoder.cross_layers": 1.208}),
    "dual-encoder": (0.87, {"vision": 0.303, "text": 0.336, "fusion": 0.202, "mae": 0.026}),
}


def prepare(name: str, **model: object) -> tuple[Config, Graph]:
    setup.apply_platform()
    changes = {f"model.{key}": value for key, value in model.items()}
    config = changed(load_config(RECIPES / f"{name}.yaml"), changes)
    sizes = parallel_sizes(config, config.parallel.world_size)
    check(config, sizes)
    return config, Assembly.of(config, sizes).graph


@pytest.mark.parametrize("name", STATED)
def test_a_recipe_has_what_its_document_states(name):
    config, _ = prepare(name)
    for path, value in STATED[name].items():
        found = config
        for field in path.split("."):
            found = getattr(found, field)
        assert found == value, path
    vocabulary = config.model.inputs.vocab_size
    assert vocabulary % 1024 == 0
    if VOCABULARIES[name]:
        assert VOCABULARIES[name] <= vocabulary < VOCABULARIES[name] + 1024


@pytest.mark.parametrize("phase", ["mae", "joint"])
@pytest.mark.parametrize("name", ACCUMULATED)
def test_a_step_is_as_many_mini_batches_as_stated(name, phase):
    """As the scripts launch it: they change the layout of the first phase."""
    config, sizes = launched(name, phase)
    check(config, sizes)
    assert config.model.phase == phase and config.training.global_batch_size == 2048
    assert config.training.global_batch_size / (config.training.micro_batch_size * sizes.dp) == ACCUMULATED[name]


@pytest.mark.parametrize("name", BILLIONS)
def test_parameters_are_within_a_hundredth(name):
    config, graph = prepare(name)
    total, parts = BILLIONS[name]
    plan, counts = full_plan(config), defaultdict(float)
    for node in graph.nodes:
        counts[re.split(r"\.\d", node.name)[0]] += node.cost(plan).parameters / 1e9
    assert sum(counts.values()) == pytest.approx(total, rel=0.01)
    for prefix, billions in parts.items():
        found = sum(count for part, count in counts.items() if part == prefix or part.startswith(f"{prefix}."))
        assert found == pytest.approx(billions, rel=0.01), prefix


@pytest.mark.parametrize(("name", "phase"), PHASES)
def test_the_slowest_stage_is_at_most_a_tenth_above_the_mean(name, phase):
    config, sizes = launched(name, phase)
    assembly = Assembly.of(config, sizes)
    assert slowest_over_mean(assembly.times, assembly.cuts) <= 1.10


@pytest.mark.parametrize("name", ["vlm-14b", "dual-encoder"])
def test_the_first_phase_is_the_tower_and_its_light_decoder(name):
    config, graph = prepare(name, phase="mae")
    assert {node.name.partition(".")[0] for node in graph.nodes} == {"vision", "mae"}
    assert config.model.inputs.patches == config.model.vision.num_patches
    _, joint = prepare(name)
    plan = full_plan(config)
    costs = {node.name: node.cost(plan).parameters for node in joint.nodes}
    assert all(costs[node.name] == node.cost(plan).parameters for node in graph.nodes if node.name in costs)
