"""Pretrained models in the parts of a system of a user's own, found by the types of its section's fields.

Truth: those models. The training graph, started from what was imported, computes what they do.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mm.config.load import load_config
from megatron_mm.config.systems import SYSTEMS
from megatron_mm.conversion.pretrained import import_pretrained
from megatron_mm.evaluation.streams import GraphReader
from tests.conversion import system_case as case
from tests.conversion.test_pretrained_systems import close, llama, vit_mae

pytestmark = pytest.mark.interface

#: A decoder and a tower of the package, in fields and places that no system of the package has.
PLUGIN = '''
from typing import Literal
from pydantic import Field
from megatron_mm.config.inputs import InputFormat
from megatron_mm.config.section import section
from megatron_mm.config.system import SystemConfig
from megatron_mm.config.systems import System, register
from megatron_mm.models.graph import Graph
from megatron_mm.objectives.causal_lm import causal_lm_loss
from megatron_mm.parts.decoder.nodes import DecoderNodes
from megatron_mm.parts.decoder.section import DecoderConfig
from megatron_mm.parts.vit.nodes import vit_nodes
from megatron_mm.parts.vit.section import MAEConfig, ViTConfig

@section
class Towers:
    eyes: ViTConfig = Field(default_factory=ViTConfig)
    mae: MAEConfig = Field(default_factory=MAEConfig)

@section
class OwnConfig(SystemConfig):
    system: Literal["NAME"] = "NAME"
    trunk: DecoderConfig = Field(default_factory=DecoderConfig)
    towers: Towers = Field(default_factory=Towers)
    MORE

    @property
    def inputs(self):
        return InputFormat(self.trunk.vocab_size, packed=False, image_size=self.towers.eyes.image_size)

def build_graph(config, settings):
    nodes = vit_nodes(config.towers.eyes, settings, config.init_std, exported="sight.eyes")
    decoder = DecoderNodes(config.trunk, settings, config.init_std)
    nodes += [decoder.embedding(), *(decoder.layer(i) for i in range(config.trunk.num_layers)), decoder.output()]
    return Graph(nodes, [causal_lm_loss(weight=1.0, kind="native")])

register(System("NAME", OwnConfig, build_graph))
'''
RECIPE = """
plugins: [own.py]
model:
  system: NAME
  trunk: {num_layers: 2, hidden_size: 32, num_attention_heads: 4, num_query_groups: 2, ffn_hidden_size: 48,
          vocab_size: 64}
  towers:
    eyes: {num_layers: 2, hidden_size: 32, num_attention_heads: 4, ffn_hidden_size: 64, patch_size: 8, image_size: 16}
    mae: {num_layers: 1, hidden_size: 16, num_attention_heads: 2, ffn_hidden_size: 32}
data: {seq_length: 16}
training: {precision: fp32}
"""


def recipe(folder: Path, name: str, more: str = "") -> Path:
    (folder / "own.py").write_text(PLUGIN.replace("NAME", name).replace("MORE", more))
    (folder / "recipe.yaml").write_text(RECIPE.replace("NAME", name))
    return folder / "recipe.yaml"


@pytest.fixture(autouse=True)
def systems():
    """What a plugin registers is forgotten after the test."""
    before = dict(SYSTEMS)
    yield
    SYSTEMS.clear()
    SYSTEMS.update(before)


def test_a_decoder_and_a_tower_of_a_plugin_are_filled(tmp_path):
    path = recipe(tmp_path, "own_towers")
    config = load_config(path)
    model = config.model
    sources = {"llama": llama(model.trunk), "vit_mae": vit_mae(model.towers.eyes, model.towers.mae)}
    for name, source in sources.items():
        source.save_pretrained(tmp_path / name)
    folders = {name: tmp_path / name for name in sources}
    written = import_pretrained(path, tmp_path / "out", quiet=True, **folders)
    reader = GraphReader(config, written)  # all of its weights are there
    batch = case.rows(config)
    streams, _ = reader.run(batch, ["logits", "image_memory"])
    real = batch.document_ids_RT >= 0
    close(streams["logits"].view(*real.shape, -1)[real], sources["llama"](batch.tokens_RT).logits[real])
    tower = sources["vit_mae"].vit
    tower.embeddings.config.mask_ratio = 0.0
    patches = model.towers.eyes.num_patches
    order = torch.arange(patches).expand(batch.plan.num_images, -1) / patches
    close(streams["image_memory"], tower(batch.images_ICHW, noise=order).last_hidden_state)


def test_what_does_not_fit_is_named_by_the_plugins_own_fields(tmp_path):
    path = recipe(tmp_path, "own_fields")
    model = load_config(path).model
    llama(model.trunk, vocab_size=60).save_pretrained(tmp_path / "llama")
    for options, message in (
        ({"llama": tmp_path / "llama"}, r"has 60 rows, model\.trunk\.vocab_size is 64"),
        ({"gpt2": tmp_path}, "GPT-2 does not fit own_fields: its text part is a decoder in Llama's form.*--llama fits"),
        ({"whisper": tmp_path}, "does not fit own_fields, which has no audio part"),
    ):
        with pytest.raises(ValueError, match=message):
            import_pretrained(path, tmp_path / "out", quiet=True, **options)


def test_two_parts_of_one_type_are_refused(tmp_path):
    """Which one a family is to fill, nothing says."""
    path = recipe(tmp_path, "own_two", "other: DecoderConfig = Field(default_factory=DecoderConfig)")
    with pytest.raises(ValueError, match=r"own_two has model\.trunk, model\.other of the type DecoderConfig"):
        import_pretrained(path, tmp_path / "out", quiet=True, llama=tmp_path)


def test_a_part_without_its_nodes_is_refused(tmp_path):
    path = recipe(tmp_path, "own_no_nodes")
    source = (tmp_path / "own.py").read_text()
    lines = [line for line in source.splitlines() if not line.startswith("    nodes = vit_nodes(")]
    text = "\n".join(lines).replace("    nodes += [", "    nodes = [")
    (tmp_path / "own.py").write_text(text)
    model = load_config(path).model
    vit_mae(model.towers.eyes, model.towers.mae).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"model\.towers\.eyes is a part .* and the graph has no nodes"):
        import_pretrained(path, tmp_path / "out", quiet=True, vit_mae=tmp_path / "vit")
