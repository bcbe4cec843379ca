#!/usr/bin/env bash
# Pretrains PerceiverFusion-XL: one call a node, the same on every node.
#
#   MASTER_ADDR=node0 NODES=8 NODE_RANK=0 examples/perceiver_fusion_xl/pretrain.sh [options of pretrain_multimodal.py]
#
# Cluster, data and tokenizer are named as examples/launch.sh says. Nothing here has run on GPUs yet; `--dry-run` runs
# on any machine.
set -euo pipefail
. "$(dirname "$0")/../launch.sh"

launch megatron_mm/recipes/perceiver-fusion-xl.yaml 8 "$@"
