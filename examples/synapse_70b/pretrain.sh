#!/usr/bin/env bash
# Pretrains Synapse-70B: one call a node, the same on every node.
#
#   MASTER_ADDR=node0 NODES=32 NODE_RANK=0 examples/synapse_70b/pretrain.sh [more options of pretrain_multimodal.py]
#
# DATA names a folder of tools/preprocess_multimodal.py, TOKENIZER its SentencePiece model, OUTPUT where figures and
# checkpoints go, CLIP a checkpoint of tools/convert_checkpoint.py import-pretrained with the frozen image tower.
# Nothing here has run on GPUs yet; `--dry-run` runs on any machine and needs none of these.
set -euo pipefail
cd "$(dirname "$0")/../.."

NODES=${NODES:-32}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-29500}
RECIPE=megatron_mm/recipes/synapse-70b.yaml

# Without a second hardware queue, communication and computation overlap in the order that megatron-core expects.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# A collective that hangs ends its process instead of waiting for ever; the watchdog has left stacks by then.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# Payloads change size with the media of a step: expandable segments keep that from fragmenting the allocator.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

for word in "$@"; do
    if [ "$word" = --dry-run ]; then
        exec python pretrain_multimodal.py --config "$RECIPE" --world-size $((NODES * GPUS_PER_NODE)) "$@"
    fi
done

exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS_PER_NODE" --node-rank "$NODE_RANK" \
    --rdzv-backend static --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
    pretrain_multimodal.py --config "$RECIPE" \
    --data-path "${DATA:?a dataset folder}" --data.tokenizer "${TOKENIZER:?a SentencePiece model}" \
    --logging.output "${OUTPUT:-outputs/synapse-70b}" ${CLIP:+--init-from "$CLIP"} "$@"
