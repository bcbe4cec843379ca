"""The exported model says what the training model says, and its weights survive every way back into training.

Truth: logits and greedy tokens that the training model itself computes after an optimizer step, rows with image and
sound, neither, video frames, and sound.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from megatron_mm.checkpoints.reader import CheckpointReader
from megatron_mm.conversion.convert import export, find_checkpoint, restore
from megatron_mm.generation.generate import Generator
from megatron_mm.systems.export import model_entries
from tests.conversion.export_case import media_batch, train_tokenizer, training_recipe
from tests.support.programs import PYTHON
from tests.support.waiting import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]


def launch(*arguments: object, processes: int = 1) -> None:
    """Run the training side; the test fails with its errors."""
    command = [PYTHON, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "tests.conversion.train_and_save", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=HANG_SECONDS, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    train_tokenizer(root / "spm.model")
    launch("train", root)
    export(root, root / "exported", quiet=True)
    return root


@pytest.mark.slow
def test_logits_and_greedy_tokens_are_the_training_models(trained):
    said = torch.load(trained / "said.pt")
    for source in (trained / "exported", trained):
        model = Generator.from_path(source).model
        inputs = media_batch(model)
        with torch.no_grad():
            logits = model(**inputs).logits
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            count = int(mask.sum())
            torch.testing.assert_close(logits[row, mask], said["logits"][row, :count], atol=1e-5, rtol=1e-5)
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, 9:]
        assert tokens.tolist() == said["tokens"].tolist()


@pytest.mark.slow
def test_restored_weights_load_in_another_layout_and_come_back_unchanged(trained, tmp_path):
    """Training → export → restore → TP2 training → its checkpoint, whose SwiGLU shards lie elsewhere: same numbers."""
    restored = restore(trained / "exported", tmp_path / "restored", quiet=True)
    (tmp_path / "spm.model").write_bytes((trained / "spm.model").read_bytes())
    launch("reload", tmp_path, restored, processes=2)
    before, after = CheckpointReader(find_checkpoint(trained)), CheckpointReader(find_checkpoint(tmp_path))
    for entry in model_entries(training_recipe().model):
        wanted, got = before.read(entry.training), after.read(entry.training)
        for part in entry.parts:
            if part.name is not None:  # key biases of the audio tower are not exported: softmax does not see them
                assert torch.equal(entry.part_view(got, part), entry.part_view(wanted, part)), part.name
