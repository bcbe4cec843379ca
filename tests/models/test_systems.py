"""The four systems as wholes: costs, fields, padding, company, what sees what, and what a weight of zero leaves out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from megatron_mm.config.schema import Config
from megatron_mm.config.systems import System, register
from megatron_mm.data.reading.generated import GeneratedRows
from megatron_mm.data.reading.microbatch import ALWAYS_READ, Microbatch
from megatron_mm.models.graph import ForwardContext, Graph
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.objectives.measures import Retrieval, TokenAccuracy
from megatron_mm.systems.graph import build_graph
from tests.models import synapse_case
from tests.support import recipes

NUMBERS = list(range(8))
#: (recipe, task of the microbatch)
CASES = {
    "avt, masked": (recipes.small_avt, {}, "masked_lm"),
    "avt, generation": (recipes.small_avt, {}, "generation"),
    "avt, contrastive alone": (recipes.small_avt, {"masked_lm_weight": 0.0, "generation_weight": 0.0}, "generation"),
    "vlm": (recipes.small_vlm, {}, ""),
    "vlm, mae": (recipes.small_vlm, {"phase": "mae"}, ""),
    "vlm, contrastive alone": (recipes.small_vlm, {"causal_lm_weight": 0.0}, ""),
    "perceiver_fusion": (recipes.small_perceiver_fusion, {}, ""),
    "perceiver_fusion, masked alone": (
        recipes.small_perceiver_fusion,
        {"matching_weight": 0.0, "contrastive_weight": 0.0},
        "",
    ),
    "perceiver_fusion, matching alone": (
        recipes.small_perceiver_fusion,
        {"masked_lm_weight": 0.0, "contrastive_weight": 0.0},
        "",
    ),
    "dual_encoder": (recipes.small_dual_encoder, {}, ""),
    "dual_encoder, mae": (recipes.small_dual_encoder, {"phase": "mae"}, ""),
    "dual_encoder, contrastive alone": (recipes.small_dual_encoder, {"causal_lm_weight": 0.0, "mae_weight": 0.0}, ""),
}
#: Those whose rows have logits of their own text.
SPEAKING = ("avt, masked", "avt, generation", "vlm", "perceiver_fusion", "dual_encoder")


def prepare(name: str) -> tuple[Config, Graph, Microbatch]:
    """Recipe, graph and eight rows: with images, clips and sounds, and without."""
    recipe, changes, task = CASES[name]
    config = recipe(**changes)
    return config, build_graph(config.model, LayerSettings()), GeneratedRows(config).microbatch(NUMBERS, task=task)


def build(graph: Graph) -> nn.ModuleDict:
    """Modules of all nodes, with tied weights in one tensor, larger than they begin so that everything matters."""
    modules = synapse_case.build(graph)
    with torch.no_grad():
        for name, parameter in modules.named_parameters():
            if parameter.dim() > 1 and "embedding" not in name:
                parameter.mul_(4.0)
    for key, copies in graph.ties.items():
        (owner, own), *others = copies
        parameter = modules[graph.nodes[owner].name.replace(".", "/")].get_parameter(own)
        for at, name in others:
            module = modules[graph.nodes[at].name.replace(".", "/")]
            path, _, last = name.rpartition(".")
            assert module.get_parameter(name).shape == parameter.shape, key
            setattr(module.get_submodule(path), last, parameter)
    return modules


def losses_of(graph: Graph, modules: nn.ModuleDict, batch: Microbatch) -> dict[str, float]:
    """Each loss that the microbatch learns, summed over its rows."""
    context = ForwardContext(batch)
    with torch.no_grad():
        _, streams = synapse_case.run(Graph(graph.nodes, []), modules, batch)
        return {
            loss.name: loss.compute(*[streams[name] for name in loss.reads], context).item()
            for loss in graph.losses
            if loss.applies(batch.plan)
        }


@pytest.mark.parametrize("name", CASES)
def test_costs_shapes_and_fields_of_every_node(name):
    """Parameters and FLOPs are what is built and what runs; a node reads no value and only fields that it names."""
    _, graph, whole = prepare(name)
    modules, streams = synapse_case.build(graph), {}
    tied = {(graph.nodes[at].name, key) for copies in graph.ties.values() for at, key in copies[1:]}
    head = {"fusion.output", "masked_lm.output"} & graph_names(graph) if "text.embedding" in graph_names(graph) else ()
    assert {key for key in tied if "layer" not in key[0]} == {(name, "output_layer.weight") for name in head}
    meta = whole.to("meta")
    for node in graph.nodes:
        module = modules[node.name.replace(".", "/")].to("meta")
        kept = ALWAYS_READ | node.fields | {"plan", "sample_ids"}
        batch = Microbatch(**{key: value for key, value in meta.__dict__.items() if key in kept})
        with FlopCounterMode(display=False) as counter:
            written = module(*[streams[stream] for stream in node.reads], ForwardContext(batch))
        written = written if isinstance(written, tuple) else (written,)
        cost = node.cost(batch.plan)
        own = [p.numel() for key, p in module.named_parameters() if (node.name, key) not in tied]
        assert cost.parameters == sum(own), node.name
        assert cost.forward_flops == counter.get_total_flops(), node.name
        for stream, value in zip(node.writes, written, strict=True):
            assert value.shape == stream.shape(batch.plan), (node.name, stream.name)
            assert value.dtype == (stream.dtype or torch.float32)
            streams[stream.name] = value
    for loss in graph.losses:
        kept = ALWAYS_READ | loss.fields | {"plan", "sample_ids"}
        batch = Microbatch(**{key: value for key, value in meta.__dict__.items() if key in kept})
        if loss.applies(batch.plan):
            assert loss.compute(*[streams[stream] for stream in loss.reads], ForwardContext(batch)).shape == ()


def graph_names(graph: Graph) -> set[str]:
    return {node.name for node in graph.nodes}


@pytest.mark.parametrize("name", CASES)
def test_everything_learns(name):
    """Every parameter has a finite gradient, and none of them is zero, but for objectives that are another task's."""
    _, graph, batch = prepare(name)
    modules = build(graph)
    context = ForwardContext(batch)
    _, streams = synapse_case.run(Graph(graph.nodes, []), modules, batch)
    learned = [loss for loss in graph.losses if loss.applies(batch.plan)]
    total = sum(loss.weight * loss.compute(*[streams[key] for key in loss.reads], context) for loss in learned)
    total.backward()
    assert torch.isfinite(total)
    for key, parameter in modules.named_parameters():
        if name == "perceiver_fusion, matching alone" and "contrastive" in key:
            assert parameter.grad is None, "embeddings choose negatives, without a gradient"
            continue
        if "scale/log_scale" in key and "contrastive_weight" in CASES[name][1]:
            continue
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", CASES)
def test_evaluation_keeps_no_graph(name):
    _, graph, batch = prepare(name)
    modules = synapse_case.build(graph).eval()
    with torch.no_grad():
        _, streams = synapse_case.run(Graph(graph.nodes, []), modules, batch)
    assert not any(stream.requires_grad for stream in streams.values())


@pytest.mark.parametrize("name", [name for name in CASES if "mae" not in name.partition(",")[2]])
def test_padding_is_not_seen(name):
    """Other tokens where there is no text change no loss."""
    _, graph, batch = prepare(name)
    modules = build(graph)
    before = losses_of(graph, modules, batch)
    padding = batch.document_ids_RT < 0
    assert padding.any()
    for field in ("tokens_RT", "masked_tokens_RT"):
        if (tokens := getattr(batch, field)) is not None:
            setattr(batch, field, torch.where(padding, 50, tokens))
    after = losses_of(graph, modules, batch)
    assert before == pytest.approx(after, rel=1e-6) and before


@pytest.mark.parametrize("name", SPEAKING)
def test_a_rows_logits_do_not_depend_on_its_company(name):
    """Beside rows with longer memories, with other media or none, and alone."""
    config, graph, batch = prepare(name)
    modules = build(graph)
    with torch.no_grad():
        together = synapse_case.logits_of(graph, modules, batch)
        for row in range(len(NUMBERS)):
            alone = GeneratedRows(config).microbatch([NUMBERS[row]], task=batch.plan.task)
            text = alone.document_ids_RT[0] >= 0
            expected = synapse_case.logits_of(graph, modules, alone)[0][text]
            scale = expected.abs().max()
            assert (together[row][text] - expected).abs().max() <= 1e-5 * scale, row


@pytest.mark.parametrize("task", ["masked_lm", "generation"])
def test_avt_sees_both_sides_where_it_learns_masked_text_only(task):
    """Another last token (of the copy that the task reads) changes earlier logits of masked microbatches alone."""
    config = recipes.small_avt()
    graph = build_graph(config.model, LayerSettings())
    modules, rows = build(graph), GeneratedRows(config)
    field, other = ("masked_tokens_RT", "tokens_RT") if task == "masked_lm" else ("tokens_RT", "masked_tokens_RT")

    def logits(changed: str) -> tuple[torch.Tensor, int]:
        batch = rows.microbatch([3], task=task)
        last = int((batch.document_ids_RT >= 0).sum()) - 1
        if changed:
            tokens = getattr(batch, changed)
            tokens[0, last] = (tokens[0, last] + 1) % 128
        with torch.no_grad():
            return synapse_case.logits_of(graph, modules, batch)[0], last

    (before, last), (after, _), (untouched, _) = logits(""), logits(field), logits(other)
    assert torch.equal(before, untouched)
    assert torch.equal(before[:last], after[:last]) is (task == "generation")
    assert not torch.equal(before[last], after[last])


def test_perceiver_fusion_predicts_from_the_masked_text_and_contrasts_the_clean_one():
    """Hidden tokens must not reach what predicts them; masks must not reach embeddings and matching."""
    _, graph, batch = prepare("perceiver_fusion")
    modules = build(graph)
    hidden = batch.masked_loss_mask_RT > 0
    assert hidden.any()

    def losses(field: str) -> dict[str, float]:
        tokens = getattr(batch, field)
        setattr(batch, field, torch.where(hidden, (tokens + 1) % 128, tokens))
        found = losses_of(graph, modules, batch)
        setattr(batch, field, tokens)
        return found

    before, clean, masked = losses_of(graph, modules, batch), losses("tokens_RT"), losses("masked_tokens_RT")
    assert clean["masked_lm"] == before["masked_lm"] and masked["masked_lm"] != before["masked_lm"]
    for name in ("contrastive", "matching"):
        assert masked[name] == before[name] and clean[name] != before[name], name


def test_the_text_embedding_of_the_vlm_has_not_seen_the_image():
    _, graph, batch = prepare("vlm")
    modules = build(graph)
    streams = []
    for scale in (1.0, -2.0):
        batch.images_ICHW = batch.images_ICHW * scale
        with torch.no_grad():
            streams.append(synapse_case.run(Graph(graph.nodes, []), modules, batch)[1])
    with_image = batch.image_slots_RK[:, 0] >= 0
    one, other = streams
    assert torch.equal(one["text_embedding"], other["text_embedding"])
    assert not torch.equal(one["image_embedding"], other["image_embedding"])
    logits = [stream["logits"].view(len(NUMBERS), -1) for stream in streams]
    assert torch.equal(logits[0][~with_image], logits[1][~with_image]), "rows without an image see none"
    assert (logits[0] != logits[1]).any(dim=1)[with_image].all()


def test_what_a_weight_of_zero_leaves_out():
    def names(config: Config) -> set[str]:
        return {name.partition(".")[0] for name in graph_names(build_graph(config.model, LayerSettings()))}

    fusion = recipes.small_perceiver_fusion
    assert names(fusion()) == {
        "vision", "text", "contrastive", "fusion", "perceiver", "matching", "masked_lm"
    }  # fmt: skip
    assert "matching" not in names(fusion(matching_weight=0.0))
    assert names(fusion(matching_weight=0.0, masked_lm_weight=0.0)) == {"vision", "text", "contrastive"}
    assert "contrastive" in names(fusion(contrastive_weight=0.0)), "matching draws hard negatives by them"
    assert "contrastive" not in names(fusion(contrastive_weight=0.0, matching_weight=0.0))
    assert names(recipes.small_dual_encoder()) == {"vision", "mae", "text", "contrastive", "fusion"}
    assert names(recipes.small_dual_encoder(mae_weight=0.0, causal_lm_weight=0.0)) == {"vision", "text", "contrastive"}
    assert names(recipes.small_dual_encoder(phase="mae")) == names(recipes.small_vlm(phase="mae")) == {"vision", "mae"}
    assert names(recipes.small_avt(contrastive_weight=0.0)) == {"vision", "audio", "fusion", "decoder"}
    alone = recipes.small_avt(masked_lm_weight=0.0, generation_weight=0.0)
    assert names(alone) == {"vision", "audio", "contrastive"}


def test_avts_microbatches_learn_only_what_has_weight():
    """Tasks of weight zero get no microbatches: they would cost a decoder pass and teach nothing."""

    def tasks(**changes: float) -> dict[str, float]:
        return dict(recipes.small_avt(**changes).model.inputs.tasks)

    assert tasks() == {"masked_lm": 0.5, "generation": 0.5}
    assert tasks(masked_lm_share=0.25) == {"masked_lm": 0.25, "generation": 0.75}
    assert set(tasks(masked_lm_weight=0.0)) == {"generation"}
    assert set(tasks(generation_weight=0.0)) == {"masked_lm"}


def test_bf16_follows_fp32_in_every_system():
    for name in SPEAKING:
        config, _, batch = prepare(name)
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            graph = build_graph(config.model, LayerSettings(dtype=dtype))
            modules = synapse_case.build(graph)
            assert {parameter.dtype for parameter in modules.parameters()} == {dtype}
            found.append(losses_of(graph, modules, batch))
        assert found[1] == pytest.approx(found[0], rel=0.02), name


def test_a_users_system_cannot_take_a_name_that_is_taken():
    config = recipes.small_vlm()
    with pytest.raises(ValueError, match="there is already a system 'vlm'"):
        register(System("vlm", type(config.model), build_graph))


def test_a_system_without_a_graph_is_named():
    config = recipes.small_vlm()
    object.__setattr__(config.model, "system", "flamingo")
    with pytest.raises(ValueError, match=r"model\.system is 'flamingo'; known systems: synapse, avt, vlm"):
        build_graph(config.model, LayerSettings())


def test_every_loss_over_tokens_has_an_accuracy_whatever_its_name():
    """AVT's next-token loss is called generation."""
    losses = build_graph(recipes.small_avt().model, LayerSettings()).losses
    assert {loss.name: type(loss.measure(loss)) for loss in losses} == {
        "contrastive": Retrieval, "masked_lm": TokenAccuracy, "generation": TokenAccuracy,
    }  # fmt: skip
