"""A new run that starts from weights of another: named nodes are loaded, the rest initialised, and a table says which.

The other may be a run of another phase or system, or what tools/convert_checkpoint.py made of a Hugging Face folder:
node names are what both have in common.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mm.pipeline.schedule import Pipeline
from megatron_mm.training import checkpoint
from megatron_mm.training.node_groups import collapsed
from megatron_mm.training.optimizer import Optimizer


def load_pretrained(
    folder: Path, pipeline: Pipeline, optimizer: Optimizer, patterns: Sequence[str] | None = None
) -> list[tuple[str, str]]:
    """Takes the weights that a checkpoint holds of some nodes; everything else keeps its initial values. Collective.

    Args:
        patterns: of names of nodes, such as `vision.*`; None: all nodes.

    Returns:
        (nodes, what became of them), over all pipeline stages.

    Raises:
        ValueError: a pattern matches no node or nothing in the checkpoint, a weight has another shape than in this
            model, or nothing fits.
    """
    stored = checkpoint.stored_shapes(folder)
    own = checkpoint.weights_of(pipeline)
    group = parallel_state.get_pipeline_model_parallel_group()
    needed: list = [None] * group.size()
    dist.all_gather_object(needed, [entry.key for entry in own.values()], group=group)
    names = [node.name for node in pipeline.graph.nodes]
    wanted = _by_node((key for keys in needed for key in keys), names)
    there = _by_node((key for key in stored if not key.startswith("optimizer.")), names)
    chosen = set(names) if patterns is None else _chosen(folder, names, there, patterns)
    keys = {key for name in chosen for key in wanted.get(name, ()) if key in stored}
    if not keys:
        raise ValueError(f"{folder} holds no weight of this model")
    taken = {name: entry for name, entry in own.items() if entry.key in keys}
    checkpoint.check_shapes(folder, taken, stored)
    checkpoint.take_weights(pipeline, checkpoint.load_entries(folder, taken))
    optimizer.reload_weights()
    return _origins(names, chosen, wanted, there)


def _by_node(keys: Iterable[str], names: Sequence[str]) -> dict[str | None, set[str]]:
    """Weights by the node that they belong to; under None those of no node."""
    known, found = set(names), defaultdict(set)
    for key in keys:
        words = key.split(".")
        prefixes = (".".join(words[:end]) for end in range(len(words) - 1, 0, -1))
        found[next((prefix for prefix in prefixes if prefix in known), None)].add(key)
    return found


def _chosen(folder: Path, names: Sequence[str], there: dict, patterns: Sequence[str]) -> set[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(
                f"checkpoint.init_nodes: {pattern!r} matches no node of this model, which are "
                f"{', '.join(collapsed(names))}"
            )
        if not any(there.get(name) for name in matched):
            raise ValueError(
                f"checkpoint.init_nodes: {pattern!r} matches {', '.join(collapsed(matched))}, of which "
                f"{folder} holds no weight"
            )
        chosen.update(matched)
    return chosen


def _origins(names: Sequence[str], chosen: set[str], wanted: dict, there: dict) -> list[tuple[str, str]]:
    verdicts: dict[str, str] = {}
    for name in names:
        missing = sorted(wanted.get(name, set()) - there.get(name, set()))
        unused = sorted(there.get(name, set()) - wanted.get(name, set()))
        count = len(wanted.get(name, ()))
        if not count:  # all its weights are another node's
            continue
        if name not in chosen:
            verdicts[name] = "initialised: not among checkpoint.init_nodes"
        elif len(missing) == count:
            verdicts[name] = "initialised: not in the checkpoint"
        elif missing:
            verdicts[name] = f"loaded {count - len(missing)} of {count} weights, without {missing[0]}"
        elif unused:
            verdicts[name] = f"loaded; the checkpoint's {unused[0]} has no place"
        else:
            verdicts[name] = "loaded"
    for key in sorted(there.get(None, ())):
        verdicts.setdefault(_unknown_node(key), "in the checkpoint, not in this model")
    kinds = dict.fromkeys(verdicts.values())
    return [(one, kind) for kind in kinds for one in collapsed([name for name in verdicts if verdicts[name] == kind])]


def _unknown_node(key: str) -> str:
    """What a node of another model was probably called: up to its last number, or two words."""
    words = key.split(".")
    last = max((at for at, word in enumerate(words) if word.isdigit()), default=1)
    return ".".join(words[: last + 1])


def table(rows: Sequence[tuple[str, str]]) -> str:
    """The origins as lines."""
    width = max(len(nodes) for nodes, _ in rows)
    return "\n".join(f"  {nodes:{width}}  {verdict}" for nodes, verdict in rows)
