# The environment of this repository's scripts: `. tools/setup_env.sh` from the root of the repository.
#
# Makes .venv with this package and what its tests need if it is missing or out of date (the lock or setup.py changed, or
# an installation was interrupted), puts it first in PATH, and sets what CPU training needs. What is installed are the
# exact releases of locks/python-3.X.txt, of the Python that runs it; for one without a file, the newest that setup.py
# allows. Another Python, another megatron-core, another torch:
#
#   PYTHON=python3.12 MEGATRON_MM_VENV=.venv-3.12 tests/run.sh
#   PYTHON=python3.12 MEGATRON_MM_VENV=.venv-old MEGATRON_MM_CORE=megatron-core==0.16.1 tests/run.sh
#   MEGATRON_MM_VENV=.venv-torch MEGATRON_MM_TORCH=torch==2.14.1 tests/run.sh
#
# Another lock file: MEGATRON_MM_LOCK=FILE; MEGATRON_MM_LOCK=newest for the newest releases that setup.py allows, looked
# for at each call.

MEGATRON_MM_VENV=${MEGATRON_MM_VENV:-.venv}
# The release that this package is tested with. A CPU build, where pip is told of one, is enough and far smaller.
MEGATRON_MM_TORCH=${MEGATRON_MM_TORCH:-$(cat locks/torch.txt)}

setup_env() {
    local python=${PYTHON:-python3} venv=$MEGATRON_MM_VENV made lock newest= wanted
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "$python is missing, does not run or is older than 3.10; set PYTHON to a newer one" >&2
        return 1
    fi
    if [ ! -x "$venv/bin/python" ]; then
        echo "making the environment $venv"
        tools/new_venv.sh "$python" "$venv" || return 1
    fi
    made=$(python_release "$venv/bin/python")
    if [ -n "${PYTHON:-}" ] && [ "$(python_release "$python")" != "$made" ]; then
        echo "$venv has Python $made, not that of PYTHON=$python; name another folder: MEGATRON_MM_VENV=$venv-new" >&2
        return 1
    fi
    lock=${MEGATRON_MM_LOCK:-locks/python-$made.txt}
    if [ "$lock" = newest ]; then
        lock= newest=1
    elif [ ! -f "$lock" ] && [ -n "${MEGATRON_MM_LOCK:-}" ]; then
        echo "there is no $lock (MEGATRON_MM_LOCK)" >&2
        return 1
    elif [ ! -f "$lock" ]; then
        echo "there is no $lock: this Python gets the newest releases that setup.py allows, which nobody tested on it"
        lock=
    fi
    wanted="$MEGATRON_MM_TORCH ${MEGATRON_MM_CORE:-} ${lock:-setup.py} $(cat ${lock:+"$lock"} setup.py | cksum)"
    if [ $newest ] || [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
        # An environment with that file was made here, by a version that left no other sign.
        [ ! -f "$venv/installed" ] || mv "$venv/installed" "$venv/.megatron_mm-output"
        install_environment || return 1
        [ $newest ] || echo "$wanted" >"$venv/installed"
    fi
    PATH=$(cd "$venv/bin" && pwd):$PATH
    # Processes share the cores: threads of their own would only get in each other's way.
    export PATH OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
}

# With the variables of setup_env.
install_environment() {
    local core=${MEGATRON_MM_CORE:-}
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then # whoever made it was interrupted
        if [ ! -f "$venv/pyvenv.cfg" ]; then
            echo "$venv is no environment of Python's venv, and has no pip; name another folder: MEGATRON_MM_VENV" >&2
            return 1
        fi
        echo "making the environment $venv anew: it has no pip"
        tools/new_venv.sh "$python" "$venv" || return 1
    fi
    if [ -f "$venv/.megatron_mm-output" ]; then # in one of another tool, packages may look half installed that are not
        "$venv/bin/python" tools/half_installed.py || return 1
    fi
    echo "installing $MEGATRON_MM_TORCH"
    if [ -n "$lock" ]; then
        # What is pinned; a megatron-core that was named takes the place of the locked one, and may bring more.
        if [ -n "$core" ]; then grep -v '^megatron-core==' "$lock"; else cat "$lock"; fi >"$venv/lock.txt"
        pip_install "$MEGATRON_MM_TORCH ($lock)" "$MEGATRON_MM_TORCH" --constraint "$venv/lock.txt" || return 1
        echo "installing megatron_mm and the releases of $lock${core:+, but $core}"
        pip_install "the releases of $lock" --no-deps --requirement "$venv/lock.txt" || return 1
        [ -z "$core" ] || pip_install "$core ($lock)" "$core" --constraint "$venv/lock.txt" || return 1
        pip_install megatron_mm --no-deps --no-build-isolation --editable . || return 1
    else
        [ -z "$newest" ] || set -- --upgrade --upgrade-strategy eager
        pip_install "$MEGATRON_MM_TORCH" "$MEGATRON_MM_TORCH" || return 1
        echo "installing megatron_mm and the newest releases that setup.py allows${core:+, with $core}"
        pip_install "megatron_mm and what setup.py asks for" \
            --editable '.[test]' "$MEGATRON_MM_TORCH" ${core:+"$core"} "$@" || return 1
    fi
}

pip_install() {
    tools/pip_install.sh "$venv/bin/python" "$@"
}

python_release() {
    "$1" -c 'import sys; print(f"{sys.version_info.major}.{sys.version_info.minor}")'
}

setup_env
