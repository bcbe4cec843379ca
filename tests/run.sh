#!/usr/bin/env bash
# The tests, from nothing: makes the environment if it is missing, checks style, runs pytest.
#
#   tests/run.sh            everything (under 20 minutes on two cores), with tests/gpu_stack/run.sh
#   tests/run.sh --fast     what one runs while working, 2 minutes: no whole runs, no layouts, no test of over a second
#   tests/run.sh --newest   what touches another package's interface (marked so), with the newest releases that setup.py
#                           allows, torch apart; in .venv-newest, brought up to date each time
#   tests/run.sh --lowest   the same with the lowest releases (locks/lowest.txt, for Python 3.11), in .venv-lowest
#   tests/run.sh PATH …     any other words go to pytest, after these options too
set -euo pipefail
cd "$(dirname "$0")/.."

mode=all selection=()
case ${1:-} in
--fast) mode=fast selection=(-m "not slow") ;;
--newest | --lowest) mode=${1#--} selection=(-m interface) ;;
*) [ $# = 0 ] || mode=chosen ;;
esac
case $mode in
newest)
    export MEGATRON_MM_VENV=${MEGATRON_MM_VENV:-.venv-newest} MEGATRON_MM_LOCK=newest
    ;;
lowest)
    export MEGATRON_MM_VENV=${MEGATRON_MM_VENV:-.venv-lowest} MEGATRON_MM_LOCK=locks/lowest.txt
    export PYTHON=${PYTHON:-python3.11}
    if [ "$("$PYTHON" -c 'import sys; print(sys.version_info[:2])')" != "(3, 11)" ]; then
        echo "error: $MEGATRON_MM_LOCK is for Python 3.11, which $PYTHON is not; set PYTHON to one" >&2
        exit 1
    fi
    ;;
esac
case $mode in fast | newest | lowest) shift ;; esac

echo "environment"
. tools/setup_env.sh

case $mode in
newest)
    lock=locks/python-$(python_release python).txt
    [ ! -f "$lock" ] || python tools/locks.py installed "$lock"
    ;;
lowest) ;;
*)
    echo "style"
    ruff check .
    lint-imports
    find . -name '*.sh' -not -path './.venv*' -not -path '*/node_modules/*' -print0 | xargs -0 -n1 bash -n
    for script in examples/*/*.slurm; do bash -n "$script"; done
    ;;
esac

if [ $mode = all ] && [ -f "locks/gpu-stack-$(python_release python).txt" ]; then
    echo "GPU stack"
    tests/gpu_stack/run.sh
elif [ $mode = all ]; then
    echo "GPU stack: left out, there is no locks/gpu-stack-$(python_release python).txt"
fi

# Debian's Chromium, for the test of inspect_dataset's page; where it cannot be had, the test says so. Debian's archive
# keeps no release but the newest, so that it cannot be pinned.
python -m tests.support.browser || true

# No other files are read: what they import may be newer than the lowest releases, or gone from the newest.
if [ $mode = newest ] || [ $mode = lowest ]; then
    named=
    for word in "$@"; do [ ! -e "${word%%::*}" ] || named=1; done
    [ $named ] || set -- "$@" $(grep -rl --include='test_*.py' 'mark\.interface' tests | sort)
fi

echo "tests"
# Two files at a time, those of whole runs first (tests/conftest.py): most tests wait for start-up or use one core.
exec python -m pytest -q --durations=15 -n 2 --dist loadfile --no-loadscope-reorder \
    ${selection[@]+"${selection[@]}"} "$@"
