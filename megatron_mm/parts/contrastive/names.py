"""Names of the contrastive heads in an exported folder."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.models.names import Entry, plain
from megatron_mm.parts.contrastive.section import ContrastiveConfig


def contrastive_entries(contrastive: ContrastiveConfig, **widths: int) -> Iterator[Entry]:
    """The projections of `contrastive.NAME` for each name and its width, and the logit scale."""
    for name, width in widths.items():
        yield plain(
            f"contrastive.{name}.projection", f"{name}_projection.weight", contrastive.embedding_size, width
        )
    yield plain("contrastive.scale.log_scale", "logit_scale", 1)
