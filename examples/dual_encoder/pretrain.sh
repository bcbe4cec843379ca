#!/usr/bin/env bash
# Pretrains the dual encoder in its two phases: one call a node and phase, the same on every node.
#
#   PHASE=mae MASTER_ADDR=node0 NODE_RANK=0 examples/dual_encoder/pretrain.sh [options of pretrain_multimodal.py]
#   INIT=outputs/dual-encoder-mae/checkpoints LM=pretrained MASTER_ADDR=node0 NODE_RANK=0 \
#       examples/dual_encoder/pretrain.sh
#
# The first trains the vision tower as a masked autoencoder, data parallel on all GPUs, in an output folder of its own.
# The second starts with the tower of the checkpoint INIT and the text encoder of LM, a checkpoint that
# `tools/convert_checkpoint.py import-pretrained` made with --gpt2 or --opt. The rest is examples/launch.sh's. Nothing
# here has run on GPUs yet; `--dry-run` runs on any machine.
set -euo pipefail
. "$(dirname "$0")/../launch.sh"

phase=()
if [ "${PHASE:-joint}" = mae ]; then
    OUTPUT=${OUTPUT:-outputs/dual-encoder-mae} # the joint phase would resume from what it finds in its own
    phase=(--model.phase mae)
elif [ -n "${INIT:-}${LM:-}" ]; then
    phase=(--init-from ${INIT:+"$INIT"} ${LM:+"$LM"} --init-nodes ${INIT:+'vision.*'} ${LM:+'text.*'})
fi
launch megatron_mm/recipes/dual-encoder.yaml 8 "${phase[@]}" "$@"
