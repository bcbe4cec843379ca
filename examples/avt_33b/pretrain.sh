#!/usr/bin/env bash
# Pretrains AVT-33B: one call a node, the same on every node.
#
#   MASTER_ADDR=node0 NODES=16 NODE_RANK=0 examples/avt_33b/pretrain.sh [more options of pretrain_multimodal.py]
#
# LLAMA may name a checkpoint of tools/convert_checkpoint.py import-pretrained with the decoder's weights; the rest is
# examples/launch.sh's. Nothing here has run on GPUs yet; `--dry-run` runs on any machine.
set -euo pipefail
. "$(dirname "$0")/../launch.sh"

launch megatron_mm/recipes/avt-33b.yaml 16 ${LLAMA:+--init-from "$LLAMA"} "$@"
