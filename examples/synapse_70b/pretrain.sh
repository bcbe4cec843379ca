#!/usr/bin/env bash
# Pretrains Synapse-70B: one call a node, the same on every node.
#
#   MASTER_ADDR=node0 NODES=32 NODE_RANK=0 examples/synapse_70b/pretrain.sh [more options of pretrain_multimodal.py]
#
# CLIP names a checkpoint of tools/convert_checkpoint.py import-pretrained with the frozen image tower; the rest is
# examples/launch.sh's. Nothing here has run on GPUs yet; `--dry-run` runs on any machine.
set -euo pipefail
. "$(dirname "$0")/../launch.sh"

launch megatron_mm/recipes/synapse-70b.yaml 32 ${CLIP:+--init-from "$CLIP"} "$@"
