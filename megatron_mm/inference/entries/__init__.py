"""For each tower, which training tensor is made of which tensors of the exported folder (see models/names.py).

One module a tower, `NAME_entries(tower, training_prefix, hf_prefix) -> Iterator[Entry]`; here is what they share: the
entries of a linear layer and of fused queries, keys and values. Those of single tensors and norms are `names.plain`,
`names.stacked` and `names.norm`.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.models.names import Entry, Part, plain


def linear(training: str, hf: str, rows: int, columns: int, bias: bool = True) -> Iterator[Entry]:
    """Weight [rows, columns] of a linear layer, and its bias."""
    yield plain(f"{training}.weight", f"{hf}.weight", rows, columns)
    if bias:
        yield plain(f"{training}.bias", f"{hf}.bias", rows)


def query_key_value(
    training: str, hf: tuple[str, str, str], heads: int, head_dim: int, columns: int, bias: bool = True
) -> Iterator[Entry]:
    """megatron-core's fused projection (of each head the query, the key, the value) from three linear layers."""
    for kind, trailing in (("weight", (columns,)), ("bias", ())) if bias else (("weight", (columns,)),):
        yield Entry(training + f".{kind}", tuple(Part(f"{name}.{kind}") for name in hf), heads, head_dim, trailing)
