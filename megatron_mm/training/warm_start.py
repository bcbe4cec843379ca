"""A new run that starts from weights of others: named nodes are loaded, the rest initialised, and a table says which.

Another may be a run of another phase or system, or what tools/convert_checkpoint.py made of a Hugging Face folder:
node names are what both have in common. Of several, each fills the nodes that none before it has filled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mm.checkpoints import checkpoint
from megatron_mm.models.node_names import collapsed, node_and_weight
from megatron_mm.pipeline.schedule import Pipeline
from megatron_mm.training.optimizer import Optimizer


def load_pretrained(
    folders: Sequence[Path], pipeline: Pipeline, optimizer: Optimizer, patterns: Sequence[str] | None = None
) -> list[tuple[str, str]]:
    """Takes the weights that checkpoints hold of some nodes; everything else keeps its initial values. Collective.

    Args:
        folders: of checkpoints; a node is taken from the first that holds any of its weights.
        patterns: of names of nodes, such as `vision.*`; None: all nodes.

    Returns:
        (nodes, what became of them), over all pipeline stages.

    Raises:
        ValueError: a pattern matches no node or nothing in the checkpoints, a weight has another shape than in this
            model, or a checkpoint gives nothing.
    """
    own = checkpoint.weights_of(pipeline)
    group = parallel_state.get_pipeline_model_parallel_group()
    needed: list = [None] * group.size()
    dist.all_gather_object(needed, [weight.key for weight in own], group=group)
    names = [node.name for node in pipeline.graph.nodes]
    wanted = _by_node((key for keys in needed for key in keys), names)
    readers = {folder: checkpoint.opened(folder) for folder in folders}
    there = {folder: _by_node(reader.weights(), names) for folder, reader in readers.items()}
    chosen = set(names) if patterns is None else _chosen(names, there, patterns)
    givers = _givers(names, chosen, wanted, there)
    for folder, reader in readers.items():
        stored = reader.shapes
        keys = {key for name, giver in givers.items() if giver == folder for key in wanted[name] & stored.keys()}
        taken = [weight for weight in own if weight.key in keys]
        checkpoint.check_shapes(folder, taken, stored)
        checkpoint.read_together(reader, [slot for weight in taken for slot in weight.slots()])
    optimizer.reload_weights()
    return _origins(names, chosen, wanted, there, givers)


def _by_node(keys: Iterable[str], names: Sequence[str]) -> dict[str | None, set[str]]:
    """Weights by the node that they belong to; under None those of no node."""
    known, found = set(names), defaultdict(set)
    for key in keys:
        words = key.split(".")
        prefixes = (".".join(words[:end]) for end in range(len(words) - 1, 0, -1))
        found[next((prefix for prefix in prefixes if prefix in known), None)].add(key)
    return found


def _chosen(names: Sequence[str], there: dict[Path, dict], patterns: Sequence[str]) -> set[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(
                f"checkpoint.init_nodes: {pattern!r} matches no node of this model, which are "
                f"{', '.join(collapsed(names))}"
            )
        if not any(held.get(name) for held in there.values() for name in matched):
            raise ValueError(
                f"checkpoint.init_nodes: {pattern!r} matches {', '.join(collapsed(matched))}, of which "
                f"{' and '.join(map(str, there))} holds no weight"
            )
        chosen.update(matched)
    return chosen


def _givers(names: Sequence[str], chosen: set[str], wanted: dict, there: dict[Path, dict]) -> dict[str, Path]:
    """The checkpoint from which each node is taken, of those that are taken from any."""
    givers: dict[str, Path] = {}
    for folder, held in there.items():
        holds = [name for name in names if wanted.get(name, set()) & held.get(name, set())]
        if not holds:
            raise ValueError(f"{folder} holds no weight of this model")
        gives = [name for name in holds if name in chosen and name not in givers]
        if not gives:
            raise ValueError(
                f"checkpoint.init_from: {folder} gives nothing: of what it holds ({', '.join(collapsed(holds))}) "
                "every node is filled by a checkpoint before it or not among checkpoint.init_nodes"
            )
        givers.update(dict.fromkeys(gives, folder))
    return givers


def _origins(
    names: Sequence[str], chosen: set[str], wanted: dict, there: dict[Path, dict], givers: dict[str, Path]
) -> list[tuple[str, str]]:
    several = len(there) > 1
    verdicts: dict[str, str] = {}
    for name in names:
        count = len(wanted.get(name, ()))
        if not count:  # all its weights are another node's
            continue
        if name in givers:
            folder = givers[name]
            verdicts[name] = _loaded(wanted[name], there[folder][name], f" from {folder}" if several else "")
        elif name in chosen:
            verdicts[name] = f"initialised: not in {'any' if several else 'the'} checkpoint"
        else:
            verdicts[name] = "initialised: not among checkpoint.init_nodes"
    for folder, held in there.items():
        for key in sorted(held.get(None, ())):
            node, _ = node_and_weight(key)
            verdicts.setdefault(node, f"in {folder if several else 'the checkpoint'}, not in this model")
    kinds = dict.fromkeys(verdicts.values())
    return [(one, kind) for kind in kinds for one in collapsed([name for name in verdicts if verdicts[name] == kind])]


def _loaded(wanted: set[str], held: set[str], source: str) -> str:
    missing, unused = sorted(wanted - held), sorted(held - wanted)
    if missing:
        return f"loaded {len(wanted) - len(missing)} of {len(wanted)} weights{source}, without {missing[0]}"
    return f"loaded{source}" + (f"; the checkpoint's {unused[0]} has no place" if unused else "")


def table(rows: Sequence[tuple[str, str]]) -> str:
    """The origins as lines."""
    width = max(len(nodes) for nodes, _ in rows)
    return "\n".join(f"  {nodes:{width}}  {verdict}" for nodes, verdict in rows)
