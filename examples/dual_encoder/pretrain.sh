#!/usr/bin/env bash
# Pretrains the dual encoder in its two phases: one call a node and phase, the same on every node.
#
#   PHASE=mae OUTPUT=outputs/dual-encoder-mae MASTER_ADDR=node0 NODE_RANK=0 examples/dual_encoder/pretrain.sh
#   INIT=outputs/dual-encoder-mae/checkpoints MASTER_ADDR=node0 NODE_RANK=0 examples/dual_encoder/pretrain.sh
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
launch megatron_mm/recipes/dual-encoder.yaml 8 "${phase[@]}" "$@"
