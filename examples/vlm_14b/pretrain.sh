#!/usr/bin/env bash
# Pretrains VLM-14B in its two phases: one call a node and phase, the same on every node.
#
#   PHASE=mae OUTPUT=outputs/vlm-14b-mae MASTER_ADDR=node0 NODE_RANK=0 examples/vlm_14b/pretrain.sh
#   INIT=outputs/vlm-14b-mae/checkpoints MASTER_ADDR=node0 NODE_RANK=0 examples/vlm_14b/pretrain.sh
#
# The first trains the vision tower as a masked autoencoder, data parallel on all GPUs; the second starts from its tower
# (INIT; LM may name more weights, of tools/convert_checkpoint.py import-pretrained, where INIT is not given). The rest is
# examples/launch.sh's. Nothing here has run on GPUs yet; `--dry-run` runs on any machine.
set -euo pipefail
. "$(dirname "$0")/../launch.sh"

phase=()
if [ "${PHASE:-joint}" = mae ]; then
    phase=(--model.phase mae --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --micro-batch-size 8
        --parallel.no-sequence-parallel)
elif [ -n "${INIT:-}" ]; then
    phase=(--init-from "$INIT" --init-nodes 'vision.*')
fi
launch megatron_mm/recipes/vlm-14b.yaml 4 "${phase[@]}" "$@"
