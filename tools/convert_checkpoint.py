"""Checkpoints to and from Hugging Face.

    python tools/convert_checkpoint.py export --checkpoint outputs/run --output exported
    python tools/convert_checkpoint.py refresh --hf exported        # a folder of before: today's code, the same weights
    python tools/convert_checkpoint.py restore --hf exported --output checkpoints
    python tools/convert_checkpoint.py import-pretrained --config RECIPE.yaml --clip clip-vit-large-patch14 \\
        --output pretrained            # then: pretrain_multimodal.py … --init-from pretrained

Weights stream through one tensor at a time, so memory stays under twice the largest tensor. An exported folder ends
with a proof, which loads it where memory allows: a few tokens generated with its cache, without it and by the training
model must be the same, or no folder is left.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, not an installed one

from megatron_mm.platform.tool import run_tool


@dataclass
class Export:
    """Training checkpoint to a folder for AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)."""

    checkpoint: Path
    """Checkpoint (…/iter_0000100), folder of checkpoints, or output folder of a run: the newest whole one is taken."""
    output: Path
    """Folder to write."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Type of the weights; default: as they are stored. fp32 takes a BF16 run's master weights."""
    max_shard_gb: float = 5.0
    """Most gigabytes of one safetensors file."""
    tokenizer: Path | None = None
    """File of a tokenizer of any kind (docs/data.md); default: the checkpoint's."""
    overwrite: bool = False
    """Replace an exported folder that is there; nothing else is ever replaced."""
    prove: bool = True
    """Run the folder and compare it with the checkpoint before it gets its name."""
    plugins: list[str] = field(default_factory=list)
    """Files or modules with a system of your own, imported first; a checkpoint names them and loads none."""

    def run(self) -> str:
        from megatron_mm.conversion.convert import export
        from megatron_mm.evaluation.export_proof import proof

        if not self.max_shard_gb > 0:
            raise ValueError(f"--max-shard-gb is {self.max_shard_gb}; it must be above 0")
        shard = int(self.max_shard_gb * 1e9)
        check = proof(self.checkpoint) if self.prove else None
        words = (self.checkpoint, self.output, self.dtype, shard, self.tokenizer, self.overwrite)
        return f"wrote {export(*words, check=check, plugins=self.plugins)}"


@dataclass
class Refresh:
    """Today's code into a folder that was exported before; its weights stay as they are."""

    hf: Path
    """Folder that export wrote."""
    prove: bool = True
    """Run the folder with its new code before anything is replaced."""
    plugins: list[str] = field(default_factory=list)
    """Files or modules with a system of your own, imported first; an exported folder names them and loads none."""

    def run(self) -> str:
        from megatron_mm.conversion.convert import refresh
        from megatron_mm.evaluation.export_proof import proof

        changed = refresh(self.hf, proof() if self.prove else None, self.plugins)
        return f"renewed {', '.join(changed)} in {self.hf}" if changed else f"{self.hf} is up to date"


@dataclass
class Restore:
    """Exported folder back to a training checkpoint (OUTPUT/iter_0000000), for --init-from."""

    hf: Path
    """Folder that export wrote."""
    output: Path
    """Folder of checkpoints to make."""
    config: Path | None = None
    """Recipe of the model; default: made from the folder's config.json."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Type of the weights; default: as they are stored."""
    overwrite: bool = False
    """Replace an iter_0000000 that is there."""
    plugins: list[str] = field(default_factory=list)
    """Files or modules with a system of your own, imported first; an exported folder names them and loads none."""

    def run(self) -> str:
        from megatron_mm.conversion.convert import restore

        words = (self.hf, self.output, self.config, self.dtype, self.overwrite)
        return f"wrote {restore(*words, plugins=self.plugins)}"


@dataclass
class ImportPretrained:
    """Weights of pretrained models into the parts of a recipe that they fit, for --init-from."""

    config: Path
    """Recipe whose model the weights enter."""
    output: Path
    """Folder of checkpoints to make."""
    clip: Path | None = None
    """Folder of a CLIP model: the image tower."""
    whisper: Path | None = None
    """Folder of a Whisper model: its encoder is the audio tower."""
    llama: Path | None = None
    """Folder of a Llama model: the decoder without cross-attention."""
    gpt2: Path | None = None
    """Folder of a GPT-2 model: the dual encoder's text encoder."""
    opt: Path | None = None
    """Folder of an OPT model: the dual encoder's text encoder."""
    vit_mae: Path | None = None
    """Folder of a ViT-MAE model: the image tower of masked autoencoders, and its decoder where the phase has one."""
    resize_vocab: bool = False
    """Cut or extend a text model's vocabulary to the recipe's (new rows: the mean) instead of refusing."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights."""
    overwrite: bool = False
    """Replace an iter_0000000 that is there."""

    def run(self) -> str:
        from megatron_mm.conversion.pretrained import import_pretrained

        written = import_pretrained(
            self.config,
            self.output,
            resize_vocab=self.resize_vocab,
            dtype=self.dtype,
            overwrite=self.overwrite,
            clip=self.clip,
            whisper=self.whisper,
            llama=self.llama,
            gpt2=self.gpt2,
            opt=self.opt,
            vit_mae=self.vit_mae,
        )
        return f"wrote {written}"


Command = (
    Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Refresh, tyro.conf.subcommand("refresh")]
    | Annotated[Restore, tyro.conf.subcommand("restore")]
    | Annotated[ImportPretrained, tyro.conf.subcommand("import-pretrained")]
)


def main() -> None:
    """Runs one subcommand and says what it made."""
    print(tyro.cli(Command, description=__doc__).run())


if __name__ == "__main__":
    run_tool(main, left="")
