# The environment of this repository's scripts: `. tools/setup_env.sh` from the root of the repository.
#
# Makes .venv with this package and its test extras if it is missing or out of date (setup.py changed), puts it first in
# PATH, and sets what CPU training needs. Another Python, with the megatron-core that is tested on it or one you name:
#
#   PYTHON=python3.12 MEGATRON_MM_VENV=.venv-3.12 tests/run.sh
#   PYTHON=python3.12 MEGATRON_MM_VENV=.venv-old MEGATRON_MM_CORE=megatron-core==0.16.1 tests/run.sh

MEGATRON_MM_VENV=${MEGATRON_MM_VENV:-.venv}
# The release that this package is tested with. A CPU build, where pip is told of one, is enough and far smaller.
MEGATRON_MM_TORCH=${MEGATRON_MM_TORCH:-torch==2.13.0}

setup_env() {
    local python=${PYTHON:-python3} venv=$MEGATRON_MM_VENV made core wanted
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "$python is missing or older than 3.10; set PYTHON to a newer one" >&2
        return 1
    fi
    if [ ! -x "$venv/bin/python" ]; then
        echo "making the environment $venv"
        "$python" -m venv "$venv" || return 1
    fi
    made=$(python_release "$venv/bin/python")
    if [ -n "${PYTHON:-}" ] && [ "$(python_release "$python")" != "$made" ]; then
        echo "$venv has Python $made, not that of PYTHON=$python; name another folder: MEGATRON_MM_VENV=$venv-new" >&2
        return 1
    fi
    # The releases that this package is tested with: from 0.17 on, megatron-core needs Python 3.12.
    case $made in
        3.10 | 3.11) core=megatron-core==0.16.1 ;;
        *) core=megatron-core==0.19.2 ;;
    esac
    core=${MEGATRON_MM_CORE:-$core}
    wanted="$MEGATRON_MM_TORCH $core $(cksum <setup.py)"
    if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
        echo "installing $MEGATRON_MM_TORCH"
        "$venv/bin/python" -m pip install --quiet "$MEGATRON_MM_TORCH" || incomplete || return 1
        echo "installing megatron_mm and what it needs (setup.py), with $core"
        "$venv/bin/python" -m pip install --quiet --editable '.[test]' "$core" || incomplete || return 1
        echo "$wanted" >"$venv/installed"
    fi
    PATH=$(cd "$venv/bin" && pwd):$PATH
    # Processes share the cores: threads of their own would only get in each other's way.
    export PATH OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
}

incomplete() {
    echo "pip could not install that, so $MEGATRON_MM_VENV is not complete; it needs PyPI, or an index that you name" >&2
    return 1
}

python_release() {
    "$1" -c 'import sys; print(f"{sys.version_info.major}.{sys.version_info.minor}")'
}

setup_env
