"""The byte mixer leaves training: exported, it says what the training graph says, to tools and to AutoModel alike.

Truth: the training graph with the checkpoint's weights; bytes of files that must not change.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from examples.own_system.answer import NEW_BYTES
from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.checkpoints.reader import CheckpointReader
from megatron_mm.checkpoints.streamed import write_checkpoint_weights
from megatron_mm.config.load import dump_config, load_config
from megatron_mm.config.systems import SYSTEMS
from megatron_mm.conversion.convert import export, refresh, restore
from megatron_mm.data.reading.rows import Document, collate
from megatron_mm.data.tokens.tokenizer import open_tokenizer
from megatron_mm.evaluation.evaluate import token_scores
from megatron_mm.evaluation.export_proof import exact_reader, proof, prove
from megatron_mm.generation.generate import Decoding, Generator
from megatron_mm.hf.exported_model import CACHE
from megatron_mm.systems.export import PLUGINS, model_entries
from tests.support.programs import PYTHON, environment
from tests.support.waiting import HANG_SECONDS

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "own_system"
PLUGIN = EXAMPLE / "byte_mixer.py"
BYTES = EXAMPLE / "bytes.json"
PROMPTS = [{"prompt": text} for text in ("import os", "x", "def f(x):\n    return ", "größe")]
SAMPLES = [
    {"id": "a", "prompt": "import ", "text": "sys\n"},
    {"id": "b", "prompt": None, "text": "größer"},
    {"id": "c", "prompt": "for name in names:", "text": " pass"},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's output folder: a small byte mixer with random weights, norms with biases."""
    root = tmp_path_factory.mktemp("run")
    config = load_config(EXAMPLE / "byte-mixer.yaml")
    config = replace(config, model=replace(config.model, num_layers=3, hidden_size=16, kernel_size=4))
    generator = torch.Generator().manual_seed(0)
    weights = {e.training: 0.3 * torch.randn(e.shape, generator=generator) for e in model_entries(config.model)}
    part = checkpoint_folder.begin(root / "checkpoints", 7)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    write_checkpoint_weights(part, shapes, torch.float32, weights.__getitem__)
    dump_config(config, part / "config.yaml")
    shutil.copyfile(BYTES, part / "byte_tokenizer.json")
    checkpoint_folder.finish(part, {"iteration": 7})
    return root


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The exported folder, proved."""
    return export(run, tmp_path_factory.mktemp("exported") / "hf", quiet=True, check=proof(run))


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Puts another line in the place of one of the modelling file's, below `source`."""

    def edit(line: str, other: str) -> None:
        source, system = tmp_path / "source", SYSTEMS["byte_mixer"]
        shutil.copytree(EXAMPLE, source)
        text = (EXAMPLE / "modeling_byte_mixer.py").read_text()
        assert line in text
        (source / "modeling_byte_mixer.py").write_text(text.replace(line, other))
        monkeypatch.setitem(SYSTEMS, "byte_mixer", replace(system, export=replace(system.export, source=source)))

    return edit


@pytest.fixture
def unknown(monkeypatch):
    """The system as a process knows it that has imported no plugin."""
    monkeypatch.delitem(SYSTEMS, "byte_mixer")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "iter_0000007"


# -------------------------------------------------------------------------------------------------- what it consists of


def test_the_folder_has_the_plugins_files_and_what_they_import(exported):
    names = {path.name for path in exported.glob("*.py")}
    assert names == {
        "configuration_byte_mixer.py", "modeling_byte_mixer.py", "processing_byte_mixer.py",
        "exported_model.py", "text_layers.py", "tokenization_bytes.py",
    }  # fmt: skip
    assert (exported / "byte_tokenizer.json").read_bytes() == BYTES.read_bytes()
    assert not (exported / "tokenizer.model").exists()
    fields = json.loads((exported / "config.json").read_text())
    special = {role: fields[f"{role}_token_id"] for role in ("pad", "bos", "eos")}
    assert special == {"pad": 0, "bos": 2, "eos": 3} and fields["vocab_size"] == fields["tokenizer_size"] == 264
    assert fields[PLUGINS] == ["byte_mixer.py"]  # no folder of this machine
    assert str(ROOT) not in (exported / "config.json").read_text()
    readme = (exported / "README.md").read_text()
    assert "sentencepiece" not in readme and "image" not in readme and "AutoModelForCausalLM" in readme


@pytest.mark.parametrize(
    ("line", "other", "message"),
    [
        ("self.norm(x) * real", "self.norm(x)", "logits of the exported model differ from the training model's"),
        ("keys[:, 0, -wanted:]", "states", "with its cache and .* without it"),
        ('found = {"logits": ', 'found = {"loss": ', "cannot use the exported model|output lacks logits"),
    ],
    ids=["padding is read", "the cache is lost", "no logits"],
)
def test_a_model_that_says_something_else_is_not_exported(run, tmp_path, edited, line, other, message):
    edited(line, other)
    with pytest.raises(ValueError, match=message):
        export(run, tmp_path / "hf", quiet=True, check=proof(run))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_system_of_which_nothing_can_be_compared_is_not_proved(run, exported, monkeypatch):
    monkeypatch.setattr("megatron_mm.evaluation.export_proof.FIELDS", {})
    with pytest.raises(ValueError, match=r"nothing of byte_mixer can be compared.*Adapter\.outputs.*--no-prove"):
        prove(exported, run)
    system = SYSTEMS["byte_mixer"]
    adapter = replace(system.export, outputs={"logits": "logits"})
    monkeypatch.setitem(SYSTEMS, "byte_mixer", replace(system, export=adapter))
    assert "48 tokens" in prove(exported, run) and "by the training model" in prove(exported, run)


# --------------------------------------------------------------------------------------------------- answers and scores


@pytest.mark.parametrize("decoding", [Decoding(12), Decoding(12, num_beams=3)], ids=["greedy", "beams"])
def test_folder_and_checkpoint_answer_alike_in_any_batch(run, exported, decoding):
    """Also with a cache whose beams are reordered, and without one."""
    of_folder, of_run = Generator.from_path(exported), Generator.from_path(run)
    answers = list(of_folder.generate(PROMPTS, decoding, batch_size=4))
    assert answers == list(of_run.generate(PROMPTS, decoding, batch_size=1)) and len(set(answers)) > 1
    of_folder.model.generation_config.use_cache = of_folder.model.config.use_cache = False
    assert answers == list(of_folder.generate(PROMPTS, decoding, batch_size=4))


def test_tokens_are_taken_back_from_the_cache(exported):
    """What assisted generation does: the cache is cropped, and other bytes follow."""
    model = Generator.from_path(exported).model
    ids = torch.tensor([list(b"import os, sys")])
    with torch.inference_mode():
        cache = model(ids, use_cache=True)[CACHE]
        cache.crop(-4)
        found = model(ids[:, -4:], **{CACHE: cache}).logits
    torch.testing.assert_close(found, model(ids).logits[:, -4:])


def test_a_cache_that_was_lost_is_refused(exported):
    model, ids = Generator.from_path(exported).model, torch.tensor([list(b"import")])
    with pytest.raises(ValueError, match="attention_mask covers 9 bytes; cache and input hold 6"):
        model(ids, attention_mask=torch.ones(1, 9))
    with pytest.raises(ValueError, match="position_ids reach 8"):
        model(ids, position_ids=torch.arange(3, 9)[None])
    with pytest.raises(TypeError, match="does not know the argument pixel_values"):
        model(ids, pixel_values=torch.zeros(1))


def test_tokens_are_scored_as_the_training_model_scores_them(run, exported):
    config, tokenizer = load_config(checkpoint(run) / "config.yaml"), open_tokenizer(BYTES)
    reader = exact_reader(config, checkpoint(run))
    loss, right, count = 0.0, 0, 0
    for sample in SAMPLES:
        prompt = [tokenizer.bos_id, *tokenizer.encode(sample["prompt"] or "")]
        row = np.array([*prompt, *tokenizer.encode(sample["text"]), tokenizer.eos_id])
        documents = [[Document(row, np.ones(row.size, bool), sample["id"])]]
        batch = collate(documents, config.model.inputs, config.data.seq_length, [0], "").microbatch
        logits = reader.run(batch, ["logits"])[0]["logits"].cpu()[0, len(prompt) - 1 : len(row) - 1]
        text = torch.from_numpy(row[len(prompt) :])
        loss += torch.nn.functional.cross_entropy(logits, text, reduction="sum").item()
        right += int((logits.argmax(dim=-1) == text).sum())
        count += len(text)
    for batch_size in (1, 3):
        found = token_scores(Generator.from_path(exported), SAMPLES, batch_size)
        assert (found.loss, found.accuracy) == (pytest.approx(loss / count, rel=1e-5), right / count)


def test_an_answer_shows_what_stands_before_the_end(exported):
    """By the protocol's tokenizer and by AutoTokenizer's."""
    alone = AutoProcessor.from_pretrained(exported, trust_remote_code=True)
    for processor in (Generator.from_path(exported).processor, alone):
        ids = [0, 2, *processor.tokenizer.encode("größe"), 3, *processor.tokenizer.encode("x"), 3]
        assert processor.decode(torch.tensor(ids)) == "größe" and processor.batch_decode([ids, [3]]) == ["größe", ""]


def test_generation_stops_at_the_end(exported):
    """Where the model says the end in the place of another token, the answer is what it was up to that token."""
    generator = Generator.from_path(exported)
    model, inputs = generator.model, generator.processor(PROMPTS[:1])
    start = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, start:].tolist()
    token = ids[4]
    assert len(ids) == 12 and 3 not in ids
    weight = model.lm_head.weight.data
    weight[[3, token]] = weight[[token, 3]]
    found = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, start:].tolist()
    assert found == [*ids[: ids.index(token)], 3]


def test_prompts_with_media_are_refused(exported):
    with pytest.raises(ValueError, match="reads text alone; a prompt has images"):
        list(Generator.from_path(exported).generate([{"prompt": "x", "images": ["a.png"]}]))


def test_a_system_that_needs_no_tokenizers_file_says_its_special_ids_itself(run, exported, tmp_path, monkeypatch):
    system = SYSTEMS["byte_mixer"]
    special = {"pad_token_id": 1, "bos_token_id": 4, "eos_token_id": None}
    fields = system.export.fields
    adapter = replace(system.export, reads_tokenizer=False, fields=lambda config: fields(config) | special)
    monkeypatch.setitem(SYSTEMS, "byte_mixer", replace(system, export=adapter))
    hf = export(run, tmp_path / "itself", quiet=True)
    found = json.loads((hf / "config.json").read_text())
    assert special.items() <= found.items() and not list(hf.glob("*tokeniz*"))
    for path in (run, exported):
        with pytest.raises(ValueError, match="byte_mixer reads text without a tokenizer's file; leave it out"):
            Generator.from_path(path, tokenizer=tmp_path / "spm.model")
    with pytest.raises(ValueError, match="leave it out"):
        export(run, tmp_path / "hf", tokenizer=tmp_path / "spm.model", quiet=True)


@pytest.mark.parametrize(
    ("line", "other", "message"),
    [
        ("self.lm_head", "self.head", r"ByteMixerModel has no lm_head\.weight"),
        ("nn.LayerNorm(width)", "nn.LayerNorm(width, bias=False)", r"has no layers\.0\.norm\.bias"),
        ("self.post_init()", "self.more = nn.Linear(2, 2)", r"missing.*more\.bias"),
        (
            "self.post_init()",
            "self.register_buffer('table', self.lm_head.weight.detach(), persistent=False)",
            "has the buffer table, which no file holds; compute it in forward",
        ),
    ],
    ids=["another name", "fewer", "more", "a buffer"],
)
def test_a_model_with_other_weights_is_refused_by_their_names(run, edited, line, other, message):
    edited(line, other)
    with pytest.raises(ValueError, match=message):
        Generator.from_path(run)


def test_a_system_without_a_processor_answers_no_prompts(exported, monkeypatch):
    system = SYSTEMS["byte_mixer"]
    bare = replace(system, export=replace(system.export, processor_class=None))
    monkeypatch.setitem(SYSTEMS, "byte_mixer", bare)
    assert "AutoProcessor" not in bare.export.auto_map(load_config(EXAMPLE / "byte-mixer.yaml").model)
    with pytest.raises(ValueError, match="'byte_mixer' has no processor of prompts"):
        Generator.from_path(exported)


# ------------------------------------------------------------------------------------------------------------- and back


def test_restored_weights_are_those_that_were_exported(run, exported, tmp_path):
    folder = restore(exported, tmp_path / "out", quiet=True, plugins=[str(PLUGIN)])
    found, wanted = CheckpointReader(folder), CheckpointReader(checkpoint(run))
    assert found.weights() == wanted.weights() and len(wanted.weights()) == 2 + 3 * 3
    assert all(torch.equal(found.read(name), wanted.read(name)) for name in wanted.weights())
    config = load_config(folder / "config.yaml")
    assert config.plugins == [str(PLUGIN)] or Path(config.plugins[0]).resolve() == PLUGIN
    assert config.model == load_config(checkpoint(run) / "config.yaml").model
    assert prove(exported, folder).endswith("largest)")


def test_without_its_plugin_a_folder_is_refused_and_runs_no_code(exported, tmp_path, monkeypatch, unknown):
    """A file of the plugin's name in the folder is not imported, whether or not the caller names it."""
    hf = shutil.copytree(exported, tmp_path / "hf")
    (hf / "byte_mixer.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    before = contents(hf)
    message = r"'byte_mixer' comes with a plugin of its recipe, byte_mixer\.py; name that file or module with --plugins"
    for use in (lambda: restore(hf, tmp_path / "out"), lambda: refresh(hf), lambda: Generator.from_path(hf)):
        with pytest.raises(ValueError, match=message):
            use()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--plugins: there is no file byte_mixer\.py, neither here nor in"):
        restore(hf, tmp_path / "out", plugins=["byte_mixer.py"])
    assert contents(hf) == before and [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_refresh_renews_the_plugins_files(exported, tmp_path):
    hf = shutil.copytree(exported, tmp_path / "hf")
    assert refresh(hf) == []
    with (hf / "modeling_byte_mixer.py").open("a") as stream:
        stream.write("# an older one\n")
    assert refresh(hf, proof(), plugins=[str(PLUGIN)]) == ["modeling_byte_mixer.py"]
    assert (hf / "modeling_byte_mixer.py").read_bytes() == (EXAMPLE / "modeling_byte_mixer.py").read_bytes()
    assert json.loads((hf / "config.json").read_text())[PLUGINS] == ["byte_mixer.py"]


def test_an_exported_folder_is_replaced_and_nothing_else_of_the_users(run, exported, tmp_path):
    hf = shutil.copytree(exported, tmp_path / "hf")
    assert export(run, hf, overwrite=True, quiet=True) == hf and contents(hf) == contents(exported)
    (hf / "byte_mixer.py").write_text("# of the user's")
    with pytest.raises(ValueError, match=r"export did not write .*byte_mixer\.py"):
        export(run, hf, overwrite=True, quiet=True)


# ---------------------------------------------------------------------------------------------------------- as programs


def call(*words: object, folder: Path = ROOT) -> subprocess.CompletedProcess:
    variables = environment(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore")
    command = [PYTHON, *map(str, words)]
    return subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, encoding="utf-8", timeout=HANG_SECONDS
    )


@pytest.mark.slow
def test_tools_name_the_plugin_that_is_missing_and_take_it(exported, tmp_path):
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in SAMPLES))
    generate = ("tools/generate.py", "--model", exported, "--prompt", "import ", "--max-new-tokens", NEW_BYTES)
    done = call(*generate)
    assert done.returncode == 1 and "--plugins" in done.stderr and "Traceback" not in done.stderr
    done = call(*generate, "--plugins", PLUGIN)
    assert done.returncode == 0, done.stderr[-2000:]
    alone = call(EXAMPLE / "answer.py", exported, "import ", folder=tmp_path)
    assert alone.returncode == 0, alone.stderr[-2000:]
    assert alone.stdout == done.stdout and len(done.stdout) > 1
    evaluate = ("tools/evaluate.py", "--model", exported, "--input", tmp_path / "held_out.jsonl", "--plugins", PLUGIN)
    done = call(*evaluate, "--json", tmp_path / "scores.json")
    assert done.returncode == 0 and "token accuracy" in done.stdout, done.stderr[-2000:]
    (row,) = json.loads((tmp_path / "scores.json").read_text())["rows"]
    found = token_scores(Generator.from_path(exported), SAMPLES)
    assert (row["token_loss"], row["token_accuracy"]) == (pytest.approx(found.loss, rel=1e-5), found.accuracy)
    done = call(*evaluate, "--swap-media")
    assert done.returncode == 1 and "no sample of" in done.stderr and "leave it out" in done.stderr


@pytest.mark.slow
def test_from_training_to_an_answer_in_one_command(tmp_path):
    """In a tree of links to this one, whose environment is the one that the tests have."""
    tree = tmp_path / "tree"
    (tree / "tools").mkdir(parents=True)
    for path in (*ROOT.iterdir(), *(ROOT / "tools").iterdir()):
        if path.name not in ("tools", "outputs", "setup_env.sh"):
            (tree / path.relative_to(ROOT)).symlink_to(path)
    (tree / "tools" / "setup_env.sh").write_text("export OMP_NUM_THREADS=1\n")
    command = ["bash", str(tree / "examples/own_system/run.sh"), "--smoke", "--output", str(tmp_path / "out")]
    variables = {**environment(PYTHONWARNINGS="ignore"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=variables, capture_output=True, encoding="utf-8", timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    out = tmp_path / "out"
    assert (out / "answer_tool.txt").read_bytes() == (out / "answer_alone.txt").read_bytes() != b""
    (row,) = json.loads((out / "scores.json").read_text())["rows"]
    assert row["samples"] == 4 and 0 <= row["token_accuracy"] <= 1
    assert "agree (values within" in done.stdout and "Done in" in done.stdout
    assert os.listdir(out / "run" / "checkpoints")
