"""Speed and memory of the data path beside its peers, on the same data, cores and number of workers.

    python benchmarks/data.py [--cases text memory order images loader] [--text FILE.jsonl] [--json FILE]

    text     tools/preprocess_data.py against Megatron-LM's script and SentencePiece's own batch encoding; same bytes
    memory   peak memory of text preprocessing on a small and a twenty times larger corpus
    order    a blend of ten datasets with 10⁹ samples: start-up, memory, random access
    images   decoded and cropped JPEGs a second against WebDataset with Pillow and Megatron-Energon
    loader   share of its time that a training step of synapse-tiny waits for data

Corpora come from Debian's packages once, into --folder. WebDataset and Energon run in an environment of their own,
which is made there (`peers.sh`), each in its own process. Megatron-LM's script is no package: --megatron-lm names a
checkout of core_v0.16.1; without it, git fetches one, and where neither is possible that ratio is not printed.
Each figure is the best of --repeats interleaved runs. Exit status 1 if two sides that must agree do not.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CASES = ("text", "memory", "order", "images", "loader")


@dataclass
class Arguments:
    """What to measure."""

    cases: tuple[str, ...] = CASES
    """Cases by name."""
    folder: Path = ROOT / "outputs" / "benchmarks"
    """Corpora, peers and what is built: a new folder, or one of earlier benchmarks."""
    megatron_lm: Path | None = None
    """Checkout of Megatron-LM, core_v0.16.1."""
    text: Path | None = None
    """JSONL for the case of that name in place of the dictionaries; its tokenizers are trained on it."""
    workers: int = 2
    """Worker processes of every side."""
    repeats: int = 3
    """Runs of each side."""
    json: Path | None = None
    """File for the figures."""
    smoke: bool = False
    """Small corpora, one run, no peers that would have to be installed; the ratios mean nothing then."""


@dataclass
class Figure:
    """One line of the table."""

    case: str
    what: str
    value: float
    unit: str
    wanted: str = ""
    """The figure that is promised, such as ">= 3"."""

    @property
    def reached(self) -> bool | None:
        """Whether the promise is kept; None without one."""
        if not self.wanted:
            return None
        sign, number = self.wanted.split()
        return self.value >= float(number) if sign == ">=" else self.value <= float(number)


def main() -> int:
    """Runs the cases and prints a table."""
    arguments = tyro.cli(Arguments, description=__doc__)
    from benchmarks.data_cases import corpora
    from megatron_mm.config import outputs
    from megatron_mm.platform.atomic_files import write_figures

    unknown = set(arguments.cases) - set(CASES)
    if unknown:
        print(f"error: no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}", file=sys.stderr)
        return 2
    try:
        outputs.check_file(arguments.json, "--json", outputs.figures("what", "value"))
        outputs.begin_folder(arguments.folder, "benchmarks/data.py", "--folder", corpora.are_in)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    figures: list[Figure] = []
    for name in arguments.cases:
        print(f"== {name}", flush=True)
        for figure in import_module(f"benchmarks.data_cases.{name}").run(arguments):
            figures.append(figure)
            state = {None: "", True: "reached", False: "NOT REACHED"}[figure.reached]
            value = f"{figure.value:,.3g}" if figure.value < 1000 else f"{figure.value:,.0f}"
            print(f"{figure.what:78} {value:>10} {figure.unit:12} {figure.wanted:8} {state}", flush=True)
    write_figures(arguments.json, [asdict(figure) for figure in figures])
    return 0


if __name__ == "__main__":
    sys.exit(main())
