# The facts of a cluster, in one place: which of its networks to use, and what its processes are told. Sourced by
# launch.sh and slurm.sh on every node. Edit it, or set a variable before: what is set already stays as it is.
#
# A variable stands here for a reason that is written beside it; what NCCL, torch and Transformer Engine find out by
# themselves is left to them. `--check` compares these settings between the nodes and measures what they lead to.

# --- Facts of the machines --------------------------------------------------------------------------------------------
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
# Where the processes meet: the first node of a job of Slurm's, or the one that you name.
if [ -z "${MASTER_ADDR:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # not into head: who writes to what has ended is killed
    MASTER_ADDR=${MASTER_ADDR%%$'\n'*}
fi
export MASTER_ADDR=${MASTER_ADDR:-localhost} MASTER_PORT=${MASTER_PORT:-29500}

# The interface of each node's cluster address, by its name (ib0, bond0). NCCL makes its first connections over it, and
# sends data over it where there is no InfiniBand; gloo uses it for everything, and otherwise the one that the host's
# name leads to, which on many clusters is 127.0.1.1. Unset, NCCL looks for one that is neither loopback nor Docker's.
INTERFACE=${INTERFACE:-}
if [ -n "$INTERFACE" ]; then
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$INTERFACE} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE}
fi
# The adapters that carry data, where a node has others too, such as one for storage: ADAPTERS='=mlx5_0,mlx5_1'.
# Unset, NCCL takes all, nearest to each GPU first.
ADAPTERS=${ADAPTERS:-}
[ -z "$ADAPTERS" ] || export NCCL_IB_HCA=${NCCL_IB_HCA:-$ADAPTERS}
# Seconds that InfiniBand waits for an answer are 4.096 µs · 2^NCCL_IB_TIMEOUT. NCCL's default (20, since 2.23) is right
# unless a large fabric is congested or re-routed: then a run ends with "got completion … error 12", and 22 outlasts it.
[ -z "${NCCL_IB_TIMEOUT:-}" ] || export NCCL_IB_TIMEOUT

# --- What processes are told ------------------------------------------------------------------------------------------
# Errors of NCCL say what went wrong; without this they are "unhandled system error". It prints nothing else.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# One hardware queue: kernels run in the order in which megatron-core starts them, so that a tensor-parallel collective
# begins before the product that it is to overlap with. GPUs from Blackwell on do not need it (and are not harmed).
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Payloads change size with the media of a step: segments that grow keep that from fragmenting the allocator. torch 2.9
# calls this name deprecated, but ignores this very option under the new one (pytorch issue 183387).
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# Threads of a process on the CPU, as many as Slurm gives a task; torchrun would set 1, and reading would wait.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-8}}
# Not set, on purpose: TORCH_NCCL_ASYNC_ERROR_HANDLING (by default a collective that fails or times out ends its process,
# and the run's own watchdog has left stacks by then); NCCL_ALGO, NCCL_PROTO and NVTE_… (their own choice is by
# measurement); NCCL_P2P_DISABLE, NCCL_IB_DISABLE (workarounds, which stay slow for ever once forgotten here).
