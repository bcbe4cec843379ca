#!/usr/bin/env bash
# The peers of benchmarks/data.py in an environment of their own, in the releases of locks/:  benchmarks/peers.sh FOLDER
set -euo pipefail
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
release=$("$python" -c 'import sys; print(f"{sys.version_info.major}.{sys.version_info.minor}")')
lock=locks/peers-$release.txt
if [ ! -f "$lock" ]; then
    echo "error: $python is Python $release, for which there is no $lock; set PYTHON to another" >&2
    exit 1
fi
torch=$(cat locks/torch.txt)
wanted="$torch $(cksum "$lock")"
if [ "$(cat "$folder/installed" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $torch and the releases of $lock in $folder"
    # Anew: what another release needed, or what an interrupted installation left, would be in the way.
    tools/new_venv.sh "$python" "$folder"
    tools/pip_install.sh "$folder/bin/python" "$torch ($lock)" "$torch" --constraint "$lock"
    tools/pip_install.sh "$folder/bin/python" "the releases of $lock" --no-deps --requirement "$lock"
    echo "$wanted" >"$folder/installed"
fi
