#!/usr/bin/env bash
# Makes an environment of Python's venv, or makes one anew that this repository's scripts made before:
#
#   tools/new_venv.sh PYTHON FOLDER [options of venv]
#
# A folder with anything else in it, such as an environment of another tool, is refused: --clear would empty it.
set -euo pipefail
python=$1 venv=$2
shift 2
marker=$venv/.megatron_mm-output

is_ours() {
    [ ! -f "$marker" ] || return 0
    [ -n "$(find "$venv" -type f -print -quit)" ] || return 0 # interrupted before there was a file
    [ -f "$venv/pyvenv.cfg" ] || return 1
    # What earlier versions left: the list of releases at the end, the path of what an overlay lies over at its beginning.
    if [ -f "$venv/installed" ] || compgen -G "$venv/lib/python*/site-packages/main.pth" >/dev/null; then return 0; fi
    # Or it was interrupted before it had more than its tools.
    ! find "$venv"/lib*/python*/site-packages -mindepth 1 -maxdepth 1 2>/dev/null |
        grep -qvE '/(pip|setuptools|pkg_resources|_distutils_hack|distutils-precedence|__pycache__)[^/]*$'
}

if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && ! is_ours; then
    echo "error: $venv is not empty and was not made by the scripts here; remove it or name another folder" >&2
    exit 2
fi
"$python" -m venv --clear "$@" "$venv"
echo tools/new_venv.sh >"$marker"
