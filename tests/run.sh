#!/usr/bin/env bash
# The tests, from nothing: makes the environment if it is missing, checks style, runs pytest.
#
#   tests/run.sh            everything (under half an hour on two cores), with tests/gpu_stack/run.sh
#   tests/run.sh --fast     what one runs while working: no whole runs, no layouts, no quick start
#   tests/run.sh PATH …     any other words go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."

selection=() gpu_stack=$#
if [ "${1:-}" = --fast ]; then
    selection=(-m "not slow")
    shift
fi

echo "environment"
. tools/setup_env.sh

echo "style"
ruff check .
find . -name '*.sh' -not -path './.venv*' -not -path '*/node_modules/*' -print0 | xargs -0 -n1 bash -n
for script in examples/*/*.slurm; do bash -n "$script"; done

if [ "$gpu_stack" = 0 ]; then
    echo "GPU stack"
    tests/gpu_stack/run.sh
fi

# Debian's Chromium, for the test of inspect_dataset's page; where it cannot be had, the test says so.
python -m tests.browser || true

echo "tests"
# Two files at a time, those of whole runs first (tests/conftest.py): most tests wait for start-up or use one core.
exec python -m pytest -q --durations=15 -n 2 --dist loadfile --no-loadscope-reorder \
    ${selection[@]+"${selection[@]}"} "$@"
