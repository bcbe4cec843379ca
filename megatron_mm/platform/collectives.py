"""torch's collectives of one tensor by the names that 2.13 gave them; it calls the older ones deprecated."""

from __future__ import annotations

from torch import distributed

all_gather_single = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
reduce_scatter_single = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
