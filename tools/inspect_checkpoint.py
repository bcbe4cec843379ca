"""Shows what a checkpoint holds, and whether it is whole: entries, files, layout, recipe; --verify reads all of it.

    python tools/inspect_checkpoint.py outputs/run                                  a line for each checkpoint of a run
    python tools/inspect_checkpoint.py outputs/run/checkpoints/iter_0000100 --match '*.layers.0.*' --optimizer
    python tools/inspect_checkpoint.py outputs/run --verify

Without --verify, sizes of files and checksums of the small ones are compared. Exit status 1: something is damaged.
Nothing of a checkpoint runs: settings are read as plain YAML, and plugins that they name are not needed.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, not an installed one

from megatron_mm.config.outputs import check_file, figures
from megatron_mm.data.view.readable import readable_size
from megatron_mm.platform.atomic_files import write_figures
from megatron_mm.platform.tool import run_tool

if TYPE_CHECKING:
    from megatron_mm.checkpoints.inspection import Inspection, Tensor


@dataclass
class Args:
    """Inspect checkpoints."""

    path: tyro.conf.Positional[Path]
    """A checkpoint, a folder of checkpoints, or the output folder of a run."""
    verify: bool = False
    """Read all of it: every damaged block is named."""
    json: Path | None = None
    """Write the figures here."""
    optimizer: bool = False
    """List the entries of the optimizer too, which are summed up otherwise."""
    match: str | None = None
    """List entries whose key matches alone, such as '*.layers.0.*'."""


def checked(folder: Path, everything: bool) -> list[str]:
    """What is wrong with a checkpoint; says how much was read, and how fast."""
    from tqdm import tqdm

    from megatron_mm.checkpoints.inspection import bytes_of_pieces, damage

    total, began = bytes_of_pieces(folder), time.perf_counter()
    with tqdm(total=total, unit="B", unit_scale=True, desc=folder.name, disable=not everything, mininterval=0.5) as bar:
        found = list(damage(folder, everything, bar.update))
    if everything:
        seconds = time.perf_counter() - began
        said = f"{len(found)} damaged" if found else "no damage"
        print(f"{folder}: read {readable_size(total)} in {seconds:.1f} s ({readable_size(total / seconds)}/s): {said}")
    return found


def show(found: Inspection, optimizer: bool, pattern: str | None) -> None:
    """Prints a checkpoint."""
    from megatron_mm.checkpoints.inspection import printable

    told = found.figures(False, pattern)
    recipe, layout, tokenizer = told["recipe"], told["layout"], told["tokenizer"]
    print(found.folder)
    format_said = (
        "torch's distributed checkpoint, as runs wrote before: no checksums but those of its archives"
        if found.of_before
        else "pieces, each block with a checksum"
    )
    print(f"  format: {format_said}")
    counts = {"iteration": "iteration", "consumed_samples": "samples", "optimizer_step": "steps of the optimizer"}
    said = [f"{words} {told[name]:,}" for name, words in counts.items() if told[name] is not None]
    said += [f"saved in {told['seconds']:.1f} s"] if told["seconds"] is not None else []
    print(f"  position: {', '.join(said)}")
    system, precision = recipe["system"] or "system unknown", recipe["precision"] or "precision unknown"
    print(f"  recipe: {system}, {recipe['parameters']:,} parameters, {precision}")
    print(f"  tokenizer: {' of kind '.join(tokenizer.values()) if tokenizer else 'none of a known kind'}")
    sizes = " ".join(f"{name}{layout[name]}" for name in ("TP", "PP", "VPP", "CP", "DP") if name in layout)
    processes = f"{layout['processes']} processes, " if "processes" in layout else ""
    shared = ", distributed optimizer" if layout["distributed_optimizer"] else ""
    print(f"  written by: {processes}{sizes}{shared}")
    print(f"  files: {len(told['files'])}, {readable_size(told['bytes'])}")
    for name, size in told["files"].items():
        print(f"    {printable(name)}  {readable_size(size)}")
    show_entries("weights", found, None, pattern, True)
    for state in found.states():
        show_entries(f"optimizer {printable(state)}", found, state, pattern, optimizer)


def show_entries(title: str, found: Inspection, state: str | None, pattern: str | None, listed: bool) -> None:
    """Prints weights, or the entries of a state of the optimizer."""
    from megatron_mm.checkpoints.inspection import printable

    tensors, shown = found.listed(state, None), found.listed(state, pattern)
    size = readable_size(sum(tensor.bytes for tensor in tensors))
    types = ", ".join(sorted({tensor.dtype for tensor in tensors}))
    matching = f", {len(shown)} match" if pattern is not None else ""
    print(f"  {title}: {len(tensors)} entries, {size}, {types}{matching}")
    for tensor in shown if listed else ():
        print(f"    {printable(tensor.key)}  {list(tensor.shape)}  {tensor.dtype}  {pieces_of(tensor)}")


def pieces_of(tensor: Tensor) -> str:
    """Size and pieces of a tensor, in words."""
    files = list(dict.fromkeys(tensor.files))
    where = ", ".join(files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")
    count = f"{len(tensor.files)} pieces" if len(tensor.files) != 1 else "1 piece"
    return f"{readable_size(tensor.bytes)}  {count}{f' in {where}' if where else ''}"


def line_of(found: Inspection, problems: list[str]) -> str:
    """A checkpoint among others."""
    told = found.figures(False, None)
    layout = told["layout"]
    parts = [f"iteration {told['iteration']:,}" if told["iteration"] is not None else "no iteration"]
    parts += [f"samples {told['consumed_samples']:,}"] if told["consumed_samples"] is not None else []
    parts += [readable_size(told["bytes"])]
    parts += [f"{layout['processes']} processes"] if "processes" in layout else []
    parts += [f"saved in {told['seconds']:.1f} s"] if told["seconds"] is not None else []
    parts += ["format of before"] if found.of_before else []
    return f"{found.folder}: {', '.join(parts)}: {'damaged' if problems else 'whole'}"


def main() -> int:
    """Prints checkpoints; 1 where any is damaged."""
    args = tyro.cli(Args, description=__doc__)
    from megatron_mm.checkpoints.inspection import Inspection, find, printable, unfinished

    check_file(args.json, "--json", figures("checkpoints"))
    folders, results, damaged = find(args.path), [], False
    for folder in folders:
        problems = checked(folder, args.verify)
        damaged = damaged or bool(problems)
        result: dict = {"path": str(folder)}
        try:
            found = Inspection(folder)
        except (OSError, ValueError):
            print(f"{folder}: damaged")
        else:
            result = found.figures(args.optimizer, args.match)
            if len(folders) == 1 and folder == args.path:
                show(found, args.optimizer, args.match)
            else:
                print(line_of(found, problems))
        for problem in problems:
            print(f"error: {printable(problem, 1000)}", file=sys.stderr)
        results.append({**result, "verified": args.verify, "problems": problems})
    for part in unfinished(args.path):
        print(f"{part}: unfinished; the next save of this iteration replaces it")
    write_figures(args.json, {"checkpoints": results})
    return int(damaged)


if __name__ == "__main__":
    run_tool(main)
