"""What a dataset consists of: the names that builders give to files and readers open, and its manifest's counts."""

from __future__ import annotations

import numpy as np

from megatron_mm.data.corpus.samples import KINDS
from megatron_mm.data.store.indexed import CHECKSUMS

#: Files of a text shard, in the order in which they get their names: a shard without its index does not open.
SUFFIXES = (".bin", CHECKSUMS, ".json", ".idx")
#: Of a multimodal folder's manifest.
FORMAT = "megatron_mm multimodal dataset"
VERSION = 1
TABLE = "samples.npy"
#: Shard of each kind of media, within the folder.
MEDIA_SHARDS = {"images": "images", "audios": "sounds", "videos": "videos"}


def table_counts(table: np.ndarray) -> dict[str, int]:
    """Totals of a sample table, as the manifest has them."""
    return {
        "samples": int(table.size),
        "tokens": int(table["num_tokens"].sum(dtype=np.int64)),
        "loss_tokens": int(table["num_loss_tokens"].sum(dtype=np.int64)),
        **{kind: int(table[f"num_{kind}"].sum(dtype=np.int64)) for kind in KINDS},
    }
