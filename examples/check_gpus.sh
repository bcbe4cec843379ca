#!/usr/bin/env bash
# Three commands by which the owner of GPUs checks what could not be run where this was written. Each prints a line with
# numbers for each check, PASS or FAIL, and ends with status 0 or 1:
#
#   examples/check_gpus.sh one                                          one GPU
#   examples/check_gpus.sh node                                         all GPUs of a node
#   srun --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 examples/check_gpus.sh two-nodes --output FOLDER
#
# Without Slurm the last is called on both nodes: MASTER_ADDR=node0 NODE_RANK=0 (and 1) examples/check_gpus.sh two-nodes.
# FOLDER must be seen by both. Facts of the cluster and settings of NCCL are those of examples/cluster.sh. Where there is
# no CUDA the same checks run on the CPU, local backend against local backend: that shows that they run, no more.
set -euo pipefail
. "$(dirname "$0")/launch.sh"

exec python tools/check_gpus.py --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" "$@"
