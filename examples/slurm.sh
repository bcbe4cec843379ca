# What every examples/*/pretrain.slurm does: a pre-flight, then one process a GPU, and the job again where time ran out.
# Sourced, not run.
#
#   run_and_requeue examples/SYSTEM/pretrain.sh [options of pretrain_multimodal.py]
#
# The pre-flight (`--check`, on the job's own nodes) costs one more start of the processes and names a slow GPU, a node
# with other code or a folder that is not shared; the job then ends before it trains. CHECK=0 trains without it.
#
# Five minutes before the time limit Slurm signals the batch script alone (--signal=B:USR1@300). The script then sends
# SIGTERM to the processes, which save and stop, and puts the job back into the queue; the run resumes when it starts
# again. What ended before that signal (finished, failed or cancelled) stays ended. A run that finishes in those minutes
# is queued once more and finds nothing to do. --requeue by itself is for preemption and failed nodes.
#
# The step in hand and its save must fit into those minutes: at the time limit Slurm sends SIGTERM to the processes
# again, and a second one ends them at once. A run whose saves are slow says so, with the seconds to ask for in --signal.
set -euo pipefail
. examples/cluster.sh
# Every task gets the variables of this script: sbatch --export=… would otherwise hold for srun too.
tasks=(srun --kill-on-bad-exit=1 --export=ALL)

run_and_requeue() {
    local status=0 warned='' step
    [ "${CHECK:-1}" = 0 ] || "${tasks[@]}" "$@" --check
    trap 'warned=1; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1 # to the processes, not to this script
    "${tasks[@]}" "$@" &
    step=$!
    wait "$step" || status=$?
    if [ "$warned" ]; then # the signal has ended that wait, not the processes
        status=0
        wait "$step" || status=$?
        [ "$status" -ne 0 ] || scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}
