#!/usr/bin/env bash
# The peers of benchmarks/data.py in an environment of their own:  benchmarks/peers.sh FOLDER
set -euo pipefail
folder=$1
wanted="torch==2.13.0 webdataset==1.0.2 megatron-energon==7.4.1 pillow"
if [ "$(cat "$folder/installed" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $wanted in $folder"
    "${PYTHON:-python3}" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet torch==2.13.0
    # shellcheck disable=SC2086
    "$folder/bin/python" -m pip install --quiet $wanted
    echo "$wanted" >"$folder/installed"
fi
