# The environment of this repository's scripts: `. tools/setup_env.sh` from the root of the repository.
#
# Makes .venv with this package and its test extras if it is missing or out of date (setup.py changed), puts it first in
# PATH, and sets what CPU training needs. MEGATRON_MM_VENV names another folder; PYTHON another interpreter.

MEGATRON_MM_VENV=${MEGATRON_MM_VENV:-.venv}
# The release that this package is tested with. A CPU build, where pip is told of one, is enough and far smaller.
MEGATRON_MM_TORCH=${MEGATRON_MM_TORCH:-torch==2.13.0}

setup_env() {
    local python=${PYTHON:-python3} stamp=$MEGATRON_MM_VENV/installed wanted
    wanted="$MEGATRON_MM_TORCH $(cksum <setup.py)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            echo "$python is missing or older than 3.10; set PYTHON to a newer one" >&2
            return 1
        fi
        if [ ! -x "$MEGATRON_MM_VENV/bin/python" ]; then
            echo "making the environment $MEGATRON_MM_VENV"
            "$python" -m venv "$MEGATRON_MM_VENV" || return 1
        fi
        echo "installing $MEGATRON_MM_TORCH"
        "$MEGATRON_MM_VENV/bin/python" -m pip install --quiet "$MEGATRON_MM_TORCH" || return 1
        echo "installing megatron_mm and what it needs (setup.py)"
        "$MEGATRON_MM_VENV/bin/python" -m pip install --quiet --editable '.[test]' || return 1
        echo "$wanted" >"$stamp"
    fi
    PATH=$(cd "$MEGATRON_MM_VENV/bin" && pwd):$PATH
    # Processes share the cores: threads of their own would only get in each other's way.
    export PATH OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
}

setup_env
