#!/usr/bin/env bash
# Pretrains VLM-14B in its two phases: one call a node and phase, the same on every node.
#
#   PHASE=mae MASTER_ADDR=node0 NODE_RANK=0 examples/vlm_14b/pretrain.sh [options of pretrain_multimodal.py]
#   INIT=outputs/vlm-14b-mae/checkpoints LM=pretrained MASTER_ADDR=node0 NODE_RANK=0 \
#       examples/vlm_14b/pretrain.sh
#
# The first trains the vision tower as a masked autoencoder, data parallel on all GPUs, in an output folder of its own.
# The second starts with the tower of the checkpoint INIT and the decoder of LM, a checkpoint that
# `tools/convert_checkpoint.py import-pretrained` made with --llama. The rest is examples/launch.sh's. Nothing
# here has run on GPUs yet; `--dry-run` runs on any machine.
set -euo pipefail
. "$(dirname "$0")/../launch.sh"

phase=()
if [ "${PHASE:-joint}" = mae ]; then
    OUTPUT=${OUTPUT:-outputs/vlm-14b-mae} # the joint phase would resume from what it finds in its own
    phase=(--model.phase mae --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --micro-batch-size 8
        --parallel.no-sequence-parallel)
elif [ -n "${INIT:-}${LM:-}" ]; then
    phase=(--init-from ${INIT:+"$INIT"} ${LM:+"$LM"} --init-nodes ${INIT:+'vision.*'} ${LM:+'decoder.*'})
fi
launch megatron_mm/recipes/vlm-14b.yaml 4 "${phase[@]}" "$@"
