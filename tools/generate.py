"""Captions and answers from images, sounds, videos and text.

    python tools/generate.py --model outputs/run --image cat.png
    python tools/generate.py --model exported --prompt "What is heard?" --audio dog.wav --num-beams 4
    python tools/generate.py --model exported --input prompts.jsonl --output answers.jsonl --top-p 0.9

`--model` is a folder that tools/convert_checkpoint.py exported, or a training checkpoint or run. A line of the JSONL
has "prompt", "images", "audios", "videos" (all optional) and "id"; placeholders that the text lacks are put in front.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, not an installed one

from megatron_mm.config.outputs import UsageError, check_file, is_stream, records
from megatron_mm.platform.atomic_files import give_name
from megatron_mm.platform.tool import run_tool


@dataclass
class Arguments:
    """What to answer, with which model, and how."""

    model: Path
    """Exported folder, checkpoint, folder of checkpoints, or output folder of a run."""
    prompt: str | None = None
    """Text of one prompt; <image>, <audio> and <video> mark where its media stand."""
    image: list[Path] = field(default_factory=list)
    """Images of the prompt."""
    audio: list[Path] = field(default_factory=list)
    """Sounds of the prompt."""
    video: list[Path] = field(default_factory=list)
    """Videos of the prompt."""
    input: Path | None = None
    """JSONL of prompts, in place of --prompt and media."""
    media_root: Path | None = None
    """Folder to which paths in the JSONL are relative; default: the JSONL's."""
    output: Path | None = None
    """JSONL to write: id, prompt, generated, reference (the line's "text", if any)."""
    max_new_tokens: int = 64
    """Most tokens of one answer."""
    num_beams: int = 1
    """Beams of beam search; 1 takes the likeliest token each time."""
    top_p: float | None = None
    """Sample from the smallest set of tokens that holds this probability."""
    temperature: float = 1.0
    """Divides logits before sampling."""
    seed: int = 0
    """Seed of sampling."""
    batch_size: int = 8
    """Prompts handled at once."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic."""
    device: str = "auto"
    """Torch device; auto takes cuda where there is one."""
    tokenizer: Path | None = None
    """File of a tokenizer of any kind (docs/data.md); default: the one beside the weights."""
    plugins: list[str] = field(default_factory=list)
    """Files or modules with a system of your own, imported first; what --model names in their place loads none."""


def prompts_of(arguments: Arguments) -> list[dict]:
    """The prompts, with every file checked to exist."""
    from megatron_mm.generation.prompts import check_prompt, read_prompts

    single = arguments.prompt is not None or arguments.image or arguments.audio or arguments.video
    if bool(single) == (arguments.input is not None):
        raise UsageError("give either --input JSONL, or --prompt and --image, --audio, --video")
    if arguments.input is not None:
        return read_prompts(arguments.input, arguments.media_root)
    prompt = {"id": "prompt", "prompt": arguments.prompt or ""}
    for kind in ("image", "audio", "video"):
        prompt[f"{kind}s"] = [str(path) for path in getattr(arguments, kind)]
    check_prompt(prompt, "command line")
    return [prompt]


def run(arguments: Arguments) -> None:
    """Answer the prompts, on the terminal and in --output."""
    check_file(arguments.output, "--output", records("generated"))
    prompts = prompts_of(arguments)
    from megatron_mm.generation.generate import Decoding, Generator
    from megatron_mm.generation.prompts import result_line

    decoding = Decoding(
        arguments.max_new_tokens, arguments.num_beams, arguments.top_p, arguments.temperature, arguments.seed
    )
    decoding.arguments()
    device = arguments.device
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    words = (arguments.model, arguments.dtype, device, arguments.tokenizer, arguments.plugins)
    generator = Generator.from_path(*words)
    answers = generator.generate(prompts, decoding, arguments.batch_size, progress=len(prompts) > 1)
    with _Output(arguments.output) as output:
        for prompt, answer in zip(prompts, answers):
            output.write(result_line(prompt, answer))
            print(f"{prompt['id']}: {answer}" if len(prompts) > 1 else answer, flush=True)


class _Output:
    """The output JSONL, under the name `….part` until it is whole; answers so far survive an error there.

    Those of an earlier start that did not end stay as well: its `….part` becomes `….part.1`, or the next free number.
    """

    def __init__(self, path: Path | None):
        self.path = path

    def __enter__(self) -> _Output:
        self.stream = None
        if self.path is not None and is_stream(str(self.path)):
            self.part = self.path
            self.stream = open(self.path, "w", encoding="utf-8")
        elif self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.part = self.path.with_name(self.path.name + ".part")
            if self.part.exists() and self.part.stat().st_size:
                names = (self.part.with_name(f"{self.part.name}.{number}") for number in itertools.count(1))
                earlier = next(name for name in names if not name.exists())
                self.part.rename(earlier)
                print(f"answers of an earlier start are in {earlier}", file=sys.stderr)
            self.stream = open(self.part, "w", encoding="utf-8")
        return self

    def write(self, line: str) -> None:
        if self.stream is not None:
            self.stream.write(line + "\n")
            self.stream.flush()

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.stream is not None:
            self.stream.close()
            if self.part == self.path:
                return
            if kind is None:
                give_name(self.part, self.path)
            elif self.part.stat().st_size:
                print(f"answers so far are in {self.part}", file=sys.stderr)
            else:
                self.part.unlink()


def main() -> None:
    """Answers every prompt."""
    run(tyro.cli(Arguments, description=__doc__))


if __name__ == "__main__":
    run_tool(main, left="")
