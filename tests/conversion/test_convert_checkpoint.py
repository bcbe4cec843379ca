"""Names, streams and conversions: every value arrives in its place, whatever wrote it, and what does not fit is named.

Truth: the fused layouts written out by loops; torch's own distributed checkpoint and safetensors packages as the other
side of our streams; transformers' CLIP, Whisper and Llama as the source of pretrained weights.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from megatron_mm.checkpoints.reader import CheckpointReader
from megatron_mm.checkpoints.slots import Slot
from megatron_mm.config.load import dump_config
from megatron_mm.config.section import changed
from megatron_mm.conversion.convert import export, find_checkpoint, restore
from megatron_mm.conversion.pretrained import import_pretrained, resize_rows
from megatron_mm.conversion.safetensors_stream import INDEX, SafetensorsFolder, SafetensorsWriter
from megatron_mm.models.names import Part, checkpoint_key
from megatron_mm.systems.export import model_entries
from tests.conversion.export_case import (
    hf_model,
    media_batch,
    random_weights,
    tiny_recipe,
    train_tokenizer,
    write_training_folder,
)
from tests.support.programs import INTERPRETER, PYTHON

pytestmark = pytest.mark.interface

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A training checkpoint and its export."""
    root = tmp_path_factory.mktemp("convert")
    recipe = tiny_recipe()
    tokenizer = train_tokenizer(root / "spm.model")
    weights = random_weights(recipe.model)
    checkpoint = write_training_folder(root / "run" / "checkpoints", recipe, weights, tokenizer)
    exported = export(root / "run", root / "exported", max_shard_bytes=100_000, quiet=True)
    return root, recipe, weights, checkpoint, exported


def entry_of(recipe, name):
    return next(entry for entry in model_entries(recipe.model) if entry.training == name)


# -------------------------------------------------------------------------------------------------------------- names


def test_grouped_queries_keys_and_values_go_where_megatron_has_them():
    recipe = tiny_recipe()
    entry = entry_of(recipe, "decoder.layers.1.self_attention.linear_qkv.weight")
    fused = torch.arange(128)[:, None].expand(128, 64).float()  # the row number; 2 groups of 2 + 1 + 1 heads of 16
    parts = {name.split(".")[-2]: tensor[:, 0].tolist() for name, tensor in entry.split(fused)}
    rows = {"q_proj": [], "k_proj": [], "v_proj": []}
    for group in range(2):
        start = group * 64
        rows["q_proj"] += range(start, start + 32)
        rows["k_proj"] += range(start + 32, start + 48)
        rows["v_proj"] += range(start + 48, start + 64)
    assert parts == rows


def test_memory_keys_and_values_alternate_by_head():
    entry = entry_of(tiny_recipe(), "decoder.cross_layers.0.linear_kv_audio.weight")
    fused = torch.arange(64)[:, None].expand(64, 48).float()
    (_, keys), (_, values) = entry.split(fused)
    assert keys[:, 0].tolist() == [*range(16), *range(32, 48)]
    assert values[:, 0].tolist() == [*range(16, 32), *range(48, 64)]


def test_gate_stands_before_up():
    entry = entry_of(tiny_recipe(), "decoder.layers.0.mlp.linear_fc1.weight")
    fused = torch.arange(192)[:, None].expand(192, 64).float()
    (gate_name, gate), (up_name, up) = entry.split(fused)
    assert gate_name.endswith("gate_proj.weight") and up_name.endswith("up_proj.weight")
    assert gate[:, 0].tolist() == list(range(96)) and up[:, 0].tolist() == list(range(96, 192))


def test_every_tensor_of_the_modelling_file_is_named_once():
    recipe = tiny_recipe()
    names = [part.name for entry in model_entries(recipe.model) for part in entry.parts if part.name]
    state = hf_model(recipe).state_dict()
    assert sorted(names) == sorted(state)
    shapes = {p.name: e.part_shape(p) for e in model_entries(recipe.model) for p in e.parts if p.name}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_split_then_fill_is_the_same_tensor():
    recipe = tiny_recipe()
    weights = random_weights(recipe.model)
    for entry in model_entries(recipe.model):
        parts = dict(entry.split(weights[entry.training]))
        back = torch.zeros(entry.shape)
        for part in entry.parts:
            if part.name is not None:
                entry.fill(back, part, parts[part.name])
        assert torch.equal(back, weights[entry.training]), entry.training


def test_a_shape_that_does_not_fit_is_refused_with_both_shapes():
    entry = entry_of(tiny_recipe(), "decoder.layers.0.mlp.linear_fc1.weight")
    message = r"model.layers.0.mlp.up_proj.weight has shape \[95, 64\]; the recipe needs \[96, 64\]"
    with pytest.raises(ValueError, match=message):
        entry.fill(torch.zeros(192, 64), entry.parts[1], torch.zeros(95, 64))
    with pytest.raises(ValueError, match=r"linear_fc1.weight has shape \[96, 64\]; the model has \[192, 64\]"):
        list(entry.split(torch.zeros(96, 64)))
    assert entry.parts[1] == Part("model.layers.0.mlp.up_proj.weight")


def test_norm_keys_are_transformer_engines():
    fused = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    assert checkpoint_key("decoder.layers.0.input_layernorm.weight") == fused
    assert checkpoint_key("vision.layers.3.pre_mlp_layernorm.bias") == "vision.layers.3.mlp.linear_fc1.layer_norm_bias"
    for name in ("decoder.cross_layers.0.input_layernorm.weight", "vision.embeddings.pre_layernorm.bias"):
        assert checkpoint_key(name) == name


# ------------------------------------------------------------------------------------------------------------ streams


def test_safetensors_written_are_read_by_the_safetensors_package(tmp_path):
    tensors = {"a": torch.randn(5, 7), "b": torch.randn(3), "c": torch.randn(2, 2, 2)}
    plan = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = SafetensorsWriter(tmp_path, plan, torch.bfloat16, max_shard_bytes=80)
    for name in ("c", "a", "b"):
        writer.write(name, tensors[name])
    writer.close()
    index = json.loads((tmp_path / INDEX).read_text())
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert index["metadata"]["total_size"] == 2 * (35 + 3 + 8)
    ours = SafetensorsFolder(tmp_path)
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name].bfloat16())
        assert torch.equal(ours.read(name), tensors[name].bfloat16())


def test_safetensors_of_the_package_are_read(tmp_path):
    tensors = {"x": torch.randn(4, 3), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "n": torch.arange(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path)
    assert sorted(folder.names) == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(folder.read(name), tensor) and folder.shape(name) == tuple(tensor.shape)


def test_damaged_safetensors_are_named(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.randn(40, 3)}, file)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors: not a whole safetensors file: x ends at byte \d+"):
        SafetensorsFolder(tmp_path)
    file.write_bytes(b"no")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        SafetensorsFolder(tmp_path)
    file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"found pytorch_model\.bin"):
        SafetensorsFolder(tmp_path)


def test_a_tensor_that_was_never_written_is_an_error(tmp_path):
    writer = SafetensorsWriter(tmp_path, [("a", (2,)), ("b", (2,))], torch.float32, 1000)
    writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match=r"1 tensors were not written, among them \['b'\]"):
        writer.close()


def test_checkpoint_files_are_read_by_others(tmp_path):
    """Truth: the safetensors package, which reads the file of pieces without the index beside it."""
    recipe = tiny_recipe()
    weights = random_weights(recipe.model)
    folder = write_training_folder(tmp_path, recipe, weights, train_tokenizer(tmp_path / "t.model"))
    reader, found = CheckpointReader(folder), load_file(folder / "pieces_00000.safetensors")
    assert len(found) == len(weights)
    for name, tensor in weights.items():
        piece = ",".join(f"0:{size}" for size in tensor.shape)
        assert torch.equal(found[f"{checkpoint_key(name)}[{piece}]"], tensor), name
        assert torch.equal(reader.read(name), tensor), name


def test_checkpoint_written_by_torch_is_read_in_either_spelling(tmp_path):
    tensors = {"decoder.layers.0.input_layernorm.weight": torch.randn(8), "decoder.cross_layers.0.gate": torch.randn(1)}
    dcp.save(tensors, checkpoint_id=tmp_path, no_dist=True)
    reader = CheckpointReader(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name), tensor)
    with pytest.raises(ValueError, match="holds no nothing"):
        reader.read("nothing")


def test_a_tensor_parallel_process_reads_its_rows_of_a_restored_checkpoint(folders, tmp_path):
    _, _, weights, _, exported = folders
    reader = CheckpointReader(restore(exported, tmp_path / "restored", quiet=True))
    for name in ("decoder.layers.0.mlp.linear_fc1.weight", "vision.layers.1.self_attention.linear_qkv.weight"):
        whole = weights[name]
        half = torch.zeros(whole.shape[0] // 2, *whole.shape[1:])
        slot = Slot(name, tuple(whole.shape), (half.shape[0], *(0 for _ in half.shape[1:])), half)
        reader.read_into([slot])
        assert torch.equal(half, whole[half.shape[0] :]), name
    assert reader.common["iteration"] == 0 and reader.common["consumed_samples"] == 0


# --------------------------------------------------------------------------------------------------- export, restore


def test_export_holds_the_weights_and_the_same_logits(folders):
    from transformers import AutoConfig

    from megatron_mm.hf.modeling_synapse import SynapseForCausalLM

    _, recipe, _, _, exported = folders
    assert len(list(exported.glob("*.safetensors"))) > 2
    model = SynapseForCausalLM.from_pretrained(exported).eval()
    wanted = hf_model(recipe)
    batch = media_batch(wanted)
    torch.testing.assert_close(model(**batch).logits, wanted(**batch).logits)
    config = AutoConfig.from_pretrained(exported, trust_remote_code=True)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 3, 0)
    assert model.generation_config.eos_token_id == 3


def test_restore_is_the_checkpoint_again(folders, tmp_path):
    _, recipe, weights, checkpoint, exported = folders
    restored = restore(exported, tmp_path / "again", quiet=True)
    assert restored == tmp_path / "again" / "iter_0000000" == find_checkpoint(tmp_path / "again")
    reader = CheckpointReader(restored)
    for name, tensor in weights.items():
        assert torch.equal(reader.read(name), tensor), name
    from megatron_mm.config.load import load_config

    again = load_config(restored / "config.yaml")
    assert again.model.decoder == recipe.model.decoder and again.model.vision == recipe.model.vision
    assert (restored / "tokenizer.model").read_bytes() == (checkpoint / "tokenizer.model").read_bytes()


def test_bf16_export_rounds_and_fp32_takes_master_weights(tmp_path):
    recipe = tiny_recipe()
    weights = random_weights(recipe.model)
    name = "decoder.output.output_layer.weight"
    tokenizer = train_tokenizer(tmp_path / "t.model")
    weights["optimizer.fp32_param." + name] = weights[name] + 1
    folder = write_training_folder(tmp_path / "c", recipe, weights, tokenizer)
    low = SafetensorsFolder(export(folder, tmp_path / "low", dtype="bf16", quiet=True))
    assert torch.equal(low.read("lm_head.weight"), weights[name].bfloat16())
    high = SafetensorsFolder(export(folder, tmp_path / "high", dtype="fp32", quiet=True))
    assert torch.equal(high.read("lm_head.weight"), weights[name] + 1)


LOAD_WITHOUT_MEGATRON = """
import sys
for name in ("megatron", "megatron_mm"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
from transformers import AutoModelForCausalLM, AutoProcessor
folder, batch_file, picture, sound, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
batch = torch.load(batch_file)
inputs = processor([{"prompt": "what is this", "images": [picture]}, {"prompt": "sound", "audios": [sound]}])
ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
tokens = model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None)
texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:])
torch.save({"logits": model(**batch).logits.detach(), "tokens": tokens, "inputs": inputs, "texts": texts}, out)
assert not any(name == "megatron" or name.startswith(("megatron.", "megatron_mm."))
               for name, module in sys.modules.items() if module is not None)
"""


@pytest.mark.slow
def test_export_loads_where_there_is_no_megatron(folders, tmp_path):
    from tests.conversion.export_case import draw, sing

    _, recipe, _, _, exported = folders
    wanted = hf_model(recipe)
    batch = media_batch(wanted)
    torch.save(batch, tmp_path / "batch.pt")
    files = [draw(tmp_path / "a.png"), sing(tmp_path / "a.wav")]
    run = subprocess.run(
        [PYTHON, "-c", LOAD_WITHOUT_MEGATRON, exported, tmp_path / "batch.pt", *files, tmp_path / "out.pt"],
        capture_output=True, encoding="utf-8", cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    out = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(out["logits"], wanted(**batch).logits, atol=1e-5, rtol=1e-5)
    tokens = wanted.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert out["tokens"].tolist() == tokens.tolist()
    assert out["inputs"]["image_mask"].tolist() == [[True], [False]]
    assert len(out["texts"]) == 2


def test_export_refuses_what_is_not_whole(folders, tmp_path):
    root, recipe, weights, checkpoint, exported = folders
    with pytest.raises(ValueError, match="exists and is not empty"):
        export(checkpoint, exported, quiet=True)
    with pytest.raises(ValueError, match="no such folder"):
        export(tmp_path / "nothing", tmp_path / "out", quiet=True)
    missing = {name: tensor for name, tensor in weights.items() if not name.startswith("audio.")}
    partial = write_training_folder(tmp_path / "partial", recipe, missing, root / "spm.model")
    with pytest.raises(ValueError, match=r"lacks \d+ of \d+ parameters, first audio.embeddings.conv1.weight"):
        export(partial, tmp_path / "out", quiet=True)
    extra = weights | {"extra.weight": torch.zeros(2)}
    more = write_training_folder(tmp_path / "more", recipe, extra, root / "spm.model")
    with pytest.raises(ValueError, match=r"1 of its weights have no name in an exported model, first extra\.weight"):
        export(more, tmp_path / "out", quiet=True)
    whole = write_training_folder(tmp_path / "cut", recipe, weights, root / "spm.model")
    data = next(whole.glob("*.safetensors"))
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(ValueError, match="has 1000 bytes instead of"):
        export(whole, tmp_path / "out", quiet=True)
    other = tiny_recipe(vocab_size=328)
    wrong = write_training_folder(tmp_path / "wrong", other, weights, root / "spm.model")
    with pytest.raises(ValueError, match=r"word_embeddings.weight has shape \[320, 64\]; config.yaml says \[328, 64\]"):
        export(wrong, tmp_path / "out", quiet=True)
    assert not list(tmp_path.glob("*out*"))


def test_export_refuses_a_tokenizer_larger_than_the_vocabulary(folders, tmp_path):
    recipe = tiny_recipe(vocab_size=296)
    weights = random_weights(recipe.model)
    folder = write_training_folder(tmp_path / "c", recipe, weights, folders[0] / "spm.model")
    with pytest.raises(ValueError, match="300 pieces, the model's vocabulary 296 rows"):
        export(folder, tmp_path / "out", quiet=True)


def test_restore_refuses_another_recipe(folders, tmp_path):
    other = changed(tiny_recipe(), {"model.decoder.rotary_base": 10000.0})
    dump_config(other, tmp_path / "other.yaml")
    with pytest.raises(ValueError, match=r"rope_theta: 500000\.0 in the folder, 10000\.0 in the recipe"):
        restore(folders[4], tmp_path / "out", config=tmp_path / "other.yaml", quiet=True)
    with pytest.raises(ValueError, match="exists and is not empty"):
        restore(folders[4], folders[3].parent, quiet=True, overwrite=True)
    assert find_checkpoint(folders[3].parent) == folders[3]


# --------------------------------------------------------------------------------------------------------- pretrained


def clip_config(recipe):
    tower = recipe.model.vision
    sizes = {
        "hidden_size": tower.hidden_size, "intermediate_size": tower.ffn_hidden_size, "image_size": tower.image_size,
        "num_hidden_layers": tower.num_layers, "num_attention_heads": tower.num_attention_heads,
        "patch_size": tower.patch_size,
    }  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPConfig(vision_config=sizes, text_config=text | {"vocab_size": 20})


def whisper_model(recipe):
    tower = recipe.model.audio
    return WhisperForConditionalGeneration(
        WhisperConfig(
            d_model=tower.hidden_size, encoder_layers=tower.num_layers, num_mel_bins=tower.num_mel_bins,
            encoder_attention_heads=tower.num_attention_heads, encoder_ffn_dim=tower.ffn_hidden_size,
            decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, vocab_size=60, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, max_source_positions=100,
        )
    )  # fmt: skip


def llama_model(recipe, **changes):
    d = recipe.model.decoder
    fields = {
        "vocab_size": d.vocab_size, "hidden_size": d.hidden_size, "intermediate_size": d.ffn_hidden_size,
        "num_hidden_layers": d.num_layers, "num_attention_heads": d.num_attention_heads,
        "num_key_value_heads": d.num_query_groups, "rms_norm_eps": d.layernorm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": d.rotary_base},
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**fields | changes))


@pytest.fixture
def recipe_file(tmp_path):
    dump_config(tiny_recipe(), tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


def test_pretrained_towers_and_decoder_compute_what_their_sources_do(recipe_file, tmp_path, monkeypatch):
    """The imported tensors, put into the modelling file, give the outputs of the models that they came from."""
    recipe = tiny_recipe()
    torch.manual_seed(1)
    clip, whisper, llama = CLIPModel(clip_config(recipe)), whisper_model(recipe), llama_model(recipe)
    sources = {}
    for name, source in (("clip", clip), ("whisper", whisper), ("llama", llama)):
        for parameter in source.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        sources[name] = tmp_path / name
        source.eval().save_pretrained(sources[name], max_shard_size="100KB")
    folder = import_pretrained(recipe_file, tmp_path / "out", **sources, quiet=True)
    reader = CheckpointReader(folder)
    entries = [entry for entry in model_entries(recipe.model) if entry.training in reader]
    assert {e.training for e in model_entries(recipe.model)} - {e.training for e in entries} == {
        e.training for e in model_entries(recipe.model) if "cross_layers" in e.training or "temporal" in e.training
    }
    model = hf_model(recipe)
    state = dict(pair for entry in entries for pair in entry.split(reader.read(entry.training)))
    model.load_state_dict(state, strict=False)
    for layer in model.model.cross_layers:
        torch.nn.init.zeros_(layer.gate)
    images, ids = torch.randn(2, 3, 28, 28), torch.randint(0, 300, (2, 11))
    stills = model.model.vision_tower(images, torch.tensor([-1, -1]))
    close = lambda a, b: torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)  # noqa: E731
    close(stills, clip.vision_model(images).last_hidden_state)
    close(model(ids).logits, llama(ids).logits)
    # Whisper's checkpoint has 100 positions, the recipe 25: shorter sounds use the first rows of the same sinusoids.
    mel = torch.randn(2, 16, 50)
    encoder = whisper.model.encoder
    encoder.embed_positions.weight.data = encoder.embed_positions.weight.data[:25]
    encoder.embed_positions.num_embeddings = encoder.config.max_source_positions = 25
    close(model.model.audio_tower(mel), encoder(mel).last_hidden_state)


def test_a_vision_only_clip_is_read_too(recipe_file, tmp_path):
    clip = CLIPVisionModel(clip_config(tiny_recipe()).vision_config)
    clip.save_pretrained(tmp_path / "clip")
    folder = import_pretrained(recipe_file, tmp_path / "out", clip=tmp_path / "clip", quiet=True)
    name = next(n for n in clip.state_dict() if n.endswith("patch_embedding.weight"))
    got = CheckpointReader(folder).read("vision.embeddings.patch_embedding.weight")
    assert torch.equal(got, clip.state_dict()[name])


def test_what_does_not_fit_is_refused_by_name(recipe_file, tmp_path):
    recipe = tiny_recipe()

    def refuse(kind, source, message):
        source.save_pretrained(tmp_path / "source")
        with pytest.raises(ValueError, match=message):
            import_pretrained(recipe_file, tmp_path / "out", **{kind: tmp_path / "source"}, quiet=True)
        assert not (tmp_path / "out").exists()

    refuse(
        "llama", llama_model(recipe, intermediate_size=80),
        r"gate_proj.weight has shape \[80, 64\]; the recipe needs \[96, 64\]",
    )  # fmt: skip
    refuse("llama", llama_model(recipe, num_attention_heads=8, num_key_value_heads=4, head_dim=8),
           "num_attention_heads is 8 in the checkpoint, 4 in the recipe")  # fmt: skip
    refuse("llama", llama_model(recipe, num_hidden_layers=2), "lacks model.layers.2.*num_hidden_layers is 2")
    refuse("llama", llama_model(recipe, num_hidden_layers=5), "num_hidden_layers is 5 in the checkpoint, 3")
    refuse("llama", llama_model(recipe, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
           "rope_theta is 10000.0 in the checkpoint, 500000.0 in the recipe")  # fmt: skip
    refuse("llama", llama_model(recipe, vocab_size=310), "310 rows, model.decoder.vocab_size is 320.*--resize-vocab")
    wide = clip_config(recipe).vision_config
    wide.hidden_act = "gelu"
    refuse("clip", CLIPVisionModel(wide), "hidden_act is 'gelu' in the checkpoint, 'quick_gelu' in the recipe")
    refuse("whisper", llama_model(recipe), "no Whisper checkpoint, its config.json says model_type 'llama'")
    learned = whisper_model(recipe)
    learned.model.encoder.embed_positions.weight.data += 0.1
    refuse("whisper", learned, "embed_positions.weight is not Whisper's table of sines and cosines")
    with pytest.raises(ValueError, match="nothing to import"):
        import_pretrained(recipe_file, tmp_path / "out")


def test_a_vocabulary_is_resized_on_request(recipe_file, tmp_path):
    llama = llama_model(tiny_recipe(), vocab_size=310)
    llama.save_pretrained(tmp_path / "llama")
    folder = import_pretrained(recipe_file, tmp_path / "out", llama=tmp_path / "llama", resize_vocab=True, quiet=True)
    reader = CheckpointReader(folder)
    theirs = {
        "decoder.embedding.word_embeddings.weight": llama.model.embed_tokens.weight,
        "decoder.output.output_layer.weight": llama.lm_head.weight,
    }
    for name, rows in theirs.items():
        got = reader.read(name)
        assert torch.equal(got[:310], rows)
        torch.testing.assert_close(got[310:], rows.mean(0).expand(10, -1))
    assert torch.equal(resize_rows(rows, 300), rows[:300])


def test_a_tied_llama_gives_its_embedding_to_the_head(recipe_file, tmp_path):
    llama = llama_model(tiny_recipe(), tie_word_embeddings=True)
    llama.save_pretrained(tmp_path / "llama")
    reader = CheckpointReader(import_pretrained(recipe_file, tmp_path / "out", llama=tmp_path / "llama", quiet=True))
    assert torch.equal(reader.read("decoder.output.output_layer.weight"), llama.model.embed_tokens.weight)


# ----------------------------------------------------------------------------------------------------- memory, tools


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch, transformers, sentencepiece
import megatron_mm.conversion.convert as convert, megatron_mm.conversion.pretrained as pretrained
from megatron_mm.platform import setup
setup.apply_platform()
import megatron_mm.systems.synapse.graph  # names are read from it; megatron-core itself is no tensor
torch.set_num_threads(1)
def resident():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024
peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.001)
what, source, target, recipe = sys.argv[1:]
before = resident()
thread = threading.Thread(target=watch); thread.start()
if what == "export":
    convert.export(source, target, quiet=True)
elif what == "restore":
    convert.restore(source, target, quiet=True)
else:
    pretrained.import_pretrained(recipe, target, llama=source, resize_vocab=True, quiet=True)
done = True; thread.join()
print(peak - before)
"""


@pytest.mark.slow
def test_memory_stays_under_twice_the_largest_tensor(tmp_path):
    """Vocabulary and MLP are made large enough (64 MiB, 42 MiB a tensor) to stand out of the noise of allocators."""
    wide = {"model.decoder.hidden_size": 256, "model.decoder.ffn_hidden_size": 20480}
    recipe = changed(tiny_recipe(vocab_size=65536), wide)
    weights = {e.training: torch.zeros(e.shape) + 1e-3 for e in model_entries(recipe.model)}
    largest = max(t.numel() * 4 for t in weights.values())
    total = sum(t.numel() * 4 for t in weights.values())
    assert total > 4 * largest
    dump_config(recipe, tmp_path / "recipe.yaml")
    write_training_folder(tmp_path / "c", recipe, weights, train_tokenizer(tmp_path / "t.model"))
    steps = [("export", "c", "exported"), ("restore", "exported", "restored"), ("import", "exported", "imported")]
    for what, source, target in steps:
        if what == "import":  # an exported folder has Llama's names; only its configuration must read as Llama's
            fields = json.loads((tmp_path / "exported" / "config.json").read_text())
            fields |= {"head_dim": 64, "vocab_size": recipe.model.decoder.vocab_size, "model_type": "llama"}
            (tmp_path / "exported" / "config.json").write_text(json.dumps(fields))
        command = [INTERPRETER, "-c", MEASURE, what, tmp_path / source, tmp_path / target, tmp_path / "recipe.yaml"]
        # Blocks of a real model are always returned when freed; below 32 MiB glibc would keep them for itself.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
        run = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
        assert run.returncode == 0, run.stderr[-2000:]
        assert int(run.stdout) < 2 * largest, f"{what}: {int(run.stdout) / largest:.2f} × the largest tensor"


@pytest.mark.slow
def test_the_tool_converts_and_says_what_is_wrong(folders, tmp_path):
    tool = ROOT / "tools" / "convert_checkpoint.py"

    def run(*arguments):
        return subprocess.run([PYTHON, tool, *map(str, arguments)], capture_output=True, encoding="utf-8")

    done = run("export", "--checkpoint", folders[3], "--output", tmp_path / "out", "--dtype", "bf16")
    assert done.returncode == 0 and f"wrote {tmp_path / 'out'}" in done.stdout, done.stderr
    wrong = run("restore", "--hf", tmp_path / "none", "--output", tmp_path / "x")
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: ") and "no such folder" in wrong.stderr
    assert run("export").returncode == 2
