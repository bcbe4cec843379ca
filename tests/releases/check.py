"""What one release of transformers makes of exported folders. Run by tests/releases/run.sh in its environment.

    check.py FOLDER FIGURES.json        FOLDER: what prepare.py wrote

Truth: values and greedy tokens of the training graph, in truth.pt. Each way of using a folder is a column: it is right,
or the reason stands in its place. Arguments that Trainer, accelerate and PEFT send are tried by calling these. It needs
torch, transformers, accelerate, PEFT and what processors read prompts by, and nothing of this project's package.
"""

import importlib.util
import json
import sys
import warnings
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

warnings.filterwarnings("ignore")
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
sys.modules["megatron_mm"] = None  # environments may see it; a folder's code must not
ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("run_exported", ROOT / "megatron_mm" / "evaluation" / "run_exported.py")
run_exported = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_exported)

TOLERANCE = 1e-5  # of the largest value: fp32 sums in other orders through few layers
MEDIA = {"image_mask": "images", "video_mask": "videos", "sound_mask": "sounds"}
PICTURE = "picture.jpg"
LOST = ("cache-not-returned", "cache-not-taken")


class Wrong(Exception):
    """A figure that is not what it must be."""


def close(found, wanted, name):
    """Values of training, to TOLERANCE."""
    largest = float(wanted.abs().max())
    off = float((found.float() - wanted).abs().max()) if wanted.numel() else 0.0
    if found.shape != wanted.shape or not off <= TOLERANCE * max(1.0, largest):
        raise Wrong(f"{name} off by {off:.1e}")


def same(found, wanted, name):
    """Tokens, one for one."""
    if not torch.equal(found, wanted):
        raise Wrong(f"{name}: {found.tolist()} for {wanted.tolist()}"[:200])


class Folder:
    """One system's folder, and the ways of using it."""

    def __init__(self, root):
        self.root, self.truth = root, torch.load(root / "truth.pt")
        self.given = self.truth["questions"]
        self.model = None

    @property
    def generates(self):
        """Whether the model generates text."""
        return self.truth["tokens"] is not None

    def load(self):
        """By the Auto class, in this process."""
        self.model = run_exported.load(str(self.root / "exported"))

    def processor(self):
        """A picture by the folder's processor: the tensor of training, bit for bit."""
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(str(self.root / "exported"), trust_remote_code=True)
        ((pixels, _),) = processor.media("images", self.root / PICTURE)
        if not torch.equal(pixels, self.truth["pixels"]):
            raise Wrong("other pixels than training's")

    def score(self):
        """Every field of the output, of rows with and without media."""
        given = self.given
        if self.generates:
            prompts, tokens = given["prompts"], self.truth["tokens"]
            whole = dict(prompts, input_ids=torch.cat([prompts["input_ids"], tokens], dim=1))
            mask = torch.cat([prompts["attention_mask"], torch.ones_like(tokens)], dim=1)
            given = dict(given, prompts=None, calls=[(dict(whole, attention_mask=mask), given["answered"])])
        said = run_exported.run(self.model, given)
        for name, (wanted, chosen) in self.truth["fields"].items():
            close(said["fields"][name][said["mask"].bool() if chosen is None else chosen], wanted, name)

    def generate(self, rows, **how):
        """Tokens [rows, NEW_TOKENS] after prompts; one row comes without padding and mask."""
        inputs = {name: value[rows] for name, value in self.given["prompts"].items()}
        if len(rows) == 1:
            real = inputs.pop("attention_mask")[0].bool()
            inputs["input_ids"] = inputs["input_ids"][:, real]
        torch.manual_seed(0)
        how = {"max_new_tokens": self.given["new_tokens"], "do_sample": False, "eos_token_id": None, **how}
        with torch.no_grad():
            return self.model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]

    def both(self, rows, name, **how):
        """Tokens with the cache, which are those without."""
        found = self.generate(rows, use_cache=True, **how)
        same(found, self.generate(rows, use_cache=False, **how), f"{name}, cached and uncached")
        return found

    def greedy(self):
        """Each row alone, as the training model answers."""
        for row, wanted in enumerate(self.truth["tokens"]):
            same(self.both([row], f"row {row}"), wanted[None], f"row {row} and training")

    def mixed(self):
        """All rows together, of mixed lengths, with every medium and with none."""
        every = list(range(len(self.truth["tokens"])))
        same(self.both(every, "mixed lengths"), self.truth["tokens"], "mixed lengths and training")

    def beams(self):
        """Beams of rows with and without media."""
        self.both([0, 3, 5], "beams", num_beams=3)

    def sampling(self):
        """Top-p, and never a padded row of the vocabulary."""
        found = self.both([0, 3, 5], "sampling", do_sample=True, top_p=0.9, top_k=0, temperature=1.5)
        if found.max() >= self.model.config.tokenizer_size:
            raise Wrong(f"id {int(found.max())} is beyond the tokenizer")

    def medium(self, mask):
        """Rows that have one medium, alone and together."""
        present = self.given["prompts"][mask].reshape(len(self.truth["tokens"]), -1).any(dim=1)
        rows = present.nonzero().flatten().tolist()
        if not rows:
            raise Wrong("no row has it")
        same(self.both(rows, mask), self.truth["tokens"][rows], f"{mask} and training")

    def trainer(self):
        """Trainer (and accelerate within it): a step over two accumulated batches changes the weights."""
        from transformers import PrinterCallback, Trainer, TrainingArguments

        inputs = self._labelled()
        rows = [{name: value[row] for name, value in inputs.items()} for row in range(4)]
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        arguments = TrainingArguments(
            output_dir=str(self.root / "trainer"), per_device_train_batch_size=2, gradient_accumulation_steps=2,
            max_steps=1, report_to=[], save_strategy="no", learning_rate=1e-3, use_cpu=True, disable_tqdm=True,
            logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(self.model, arguments, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if all(torch.equal(before[name], p.detach()) for name, p in self.model.named_parameters()):
            raise Wrong("no weight changed")
        self.model.load_state_dict(before, strict=False)
        self.model.eval()

    def accelerate(self):
        """A model under accelerate's hooks says the same."""
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

        inputs = self._labelled()
        with torch.no_grad():
            wanted = self.model(**inputs).loss
            add_hook_to_module(self.model, AlignDevicesHook("cpu", io_same_device=True))
            found = self.model(**inputs).loss
            remove_hook_from_module(self.model)
        close(found, wanted, "loss")

    def peft(self):
        """A fresh LoRA adapter changes nothing, and gets gradients."""
        from peft import LoraConfig, get_peft_model

        inputs = self._labelled()
        with torch.no_grad():
            wanted = self.model(**inputs).loss
        model = run_exported.load(str(self.root / "exported"))
        config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM" if self.generates else None)
        adapted = get_peft_model(model, config)
        loss = adapted(**inputs).loss
        close(loss.detach(), wanted, "loss")
        loss.backward()
        if not any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters()):
            raise Wrong("no gradient")

    def _labelled(self):
        inputs = self.given["prompts"] if self.generates else self.given["calls"][-1][0]
        return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}

    def guard(self, copy):
        """A folder that loses its cache raises, whatever the prompts."""
        self.model, kept = run_exported.load(str(self.root / copy)), self.model
        try:
            for rows in ([0], [0, 1], list(range(len(self.truth["tokens"])))):
                try:
                    found = self.generate(rows)
                except (ValueError, TypeError):
                    continue
                raise Wrong(f"it answers {found.tolist()}"[:120])
        finally:
            self.model = kept

    def ways(self):
        """(name, check) of each way of using this folder."""
        yield "load", self.load
        yield "processor", self.processor
        yield "score", self.score
        if self.generates:
            yield from (("greedy", self.greedy), ("mixed", self.mixed), ("beams", self.beams))
            yield "sampling", self.sampling
            for mask, name in MEDIA.items():
                if mask in self.given["prompts"]:
                    yield name, lambda mask=mask: self.medium(mask)
        yield from (("Trainer", self.trainer), ("accelerate", self.accelerate), ("PEFT", self.peft))
        for copy in LOST if self.generates else ():
            yield copy, lambda copy=copy: self.guard(copy)


def main():
    """See the top."""
    root, written = Path(sys.argv[1]), Path(sys.argv[2])
    figures = {"transformers": transformers.__version__, "systems": {}}
    for name in sorted(path.parent.name for path in root.glob("*/truth.pt")):
        folder, results = Folder(root / name), {}
        for way, check in folder.ways():
            try:
                check()
                results[way] = "ok"
            except Exception as error:
                results[way] = f"{type(error).__name__}: {error}"[:300]
            if way == "load" and results[way] != "ok":
                break
        figures["systems"][name] = results
        wrong = [f"{way}: {result}" for way, result in results.items() if result != "ok"]
        counts = f"{len(results) - len(wrong)} of {len(results)} right"
        print(f"{transformers.__version__:<10}{name:<18}{counts}", flush=True)
        for line in wrong:
            print(f"    {line}", flush=True)
    written.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(any(result != "ok" for results in figures["systems"].values() for result in results.values()))


if __name__ == "__main__":
    main()
