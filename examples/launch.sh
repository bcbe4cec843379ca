# What every examples/*/pretrain.sh starts with: one way to launch. Sourced, not run.
#
#   launch RECIPE NODES [options of pretrain_multimodal.py]
#
# Under Slurm with one task a GPU (as in the .slurm files) each task becomes one rank, so that SIGTERM reaches the run
# itself and it may take as long as Slurm gives it to save. Otherwise torchrun starts the GPUs of this node, passes its
# signals on, and kills what has not ended within TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (docs/pretraining.md, "Stopping
# and resuming"). `--check` looks at machines, code, settings and data instead of training. `--dry-run` runs on any
# machine, without data.
#
# DATA names a folder of tools/preprocess_multimodal.py, TOKENIZER its SentencePiece model, OUTPUT where figures and
# checkpoints go (default: the recipe's; all nodes must see it). NODES and the variables of cluster.sh say where it runs.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. examples/cluster.sh

# The Python at hand where it has megatron-core, as a container's; else that of tools/setup_env.sh, if it was made.
environment=${MEGATRON_MM_VENV:-.venv}
if [ -x "$environment/bin/python" ] &&
    ! python -c 'import importlib.util as u; assert u.find_spec("megatron.core")' 2>/dev/null; then
    PATH=$(cd "$environment/bin" && pwd):$PATH
fi

launch() {
    local recipe=$1 nodes=${NODES:-$2} word
    shift 2
    for word in "$@"; do
        if [ "$word" = --dry-run ]; then
            exec python pretrain_multimodal.py --config "$recipe" --world-size $((nodes * GPUS_PER_NODE)) "$@"
        fi
    done
    local options=(pretrain_multimodal.py --config "$recipe"
        --data-path "${DATA:?a dataset folder}" --data.tokenizer "${TOKENIZER:?a SentencePiece model}")
    [ -z "${OUTPUT:-}" ] || options+=(--logging.output "$OUTPUT")
    if [ "${SLURM_NTASKS:-1}" -gt "${SLURM_NNODES:-1}" ]; then
        export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
        exec python "${options[@]}" "$@"
    fi
    # Less than the minutes that pretrain.slurm asks for; torch 2.9 and 2.10 kill after 30 s whatever this says.
    # SIGUSR1, which Slurm sends before a time limit (--signal), would otherwise end torchrun itself.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}
    export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
    exec torchrun --nnodes "$nodes" --nproc-per-node "$GPUS_PER_NODE" --node-rank "$NODE_RANK" \
        --rdzv-backend static --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" "${options[@]}" "$@"
}
