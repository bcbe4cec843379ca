#!/usr/bin/env bash
# Exported folders of all five systems under several releases of transformers:  tests/releases/run.sh
#
#   tests/releases/run.sh            the oldest that setup.py allows, one between, the locked and the newest
#   tests/releases/run.sh RELEASE …  some of them (oldest, between, locked, newest), or any others, such as 5.5.4
#
# Each release has an environment of its own (.venv-releases/NAME) over .venv, whose packages it sees and leaves as they
# are; `oldest` and `between` are pinned (locks/releases-*.txt), `newest` is what the index has today. Folders are made
# once, by the locked release; check.py then loads, scores and generates, and calls them as Trainer, accelerate and PEFT
# do. Ends with a table of releases x systems x ways, and with 1 if anything in it is wrong.
set -euo pipefail
cd "$(dirname "$0")/../.."

. tools/setup_env.sh
main=$(python -c 'import site; print(site.getsitepackages()[0])')
work=outputs/releases
names=("$@")
[ $# -gt 0 ] || names=(oldest between locked newest)

overlay() { # NAME WHAT TO INSTALL …: an environment over .venv, made anew when what is asked for changed
    local venv=.venv-releases/$1 wanted="$main ${*:2}"
    shift
    if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ] || [ "$venv" = .venv-releases/newest ]; then
        tools/new_venv.sh python "$venv" --without-pip
        echo "$main" >"$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/main.pth"
        tools/pip_install.sh "$venv/bin/python" "$*" "$@" "$MEGATRON_MM_TORCH"
        echo "$wanted" >"$venv/installed"
    fi
}

mkdir -p "$work"
code=$(cat tests/releases/prepare.py megatron_mm/{hf,media}/*.py megatron_mm/conversion/hf_folder.py | cksum)
if [ "$(cat "$work/prepared" 2>/dev/null)" != "$code" ]; then
    echo "folders of the five systems, with random weights"
    rm -rf "$work/folders"
    python -m tests.releases.prepare "$work/folders" 2>"$work/prepare.log" || { tail -n 5 "$work/prepare.log" && exit 1; }
    echo "$code" >"$work/prepared"
fi

# What from_pretrained copies of a folder's code goes to a place of its own, and nothing is looked for on a hub.
export HF_MODULES_CACHE=$PWD/$work/modules HF_HUB_OFFLINE=1
figures=()
for name in "${names[@]}"; do
    python=.venv-releases/$name/bin/python
    case $name in
    oldest | between) overlay "$name" --no-deps --requirement "locks/releases-$name.txt" ;;
    locked) python=python ;;
    newest) overlay newest --upgrade --upgrade-strategy eager "transformers<6" accelerate peft ;;
    *) overlay "$name" "transformers==$name" accelerate peft ;;
    esac
    rm -rf "$HF_MODULES_CACHE"
    "$python" -W ignore tests/releases/check.py "$work/folders" "$work/$name.json" 2>"$work/$name.log" ||
        [ -f "$work/$name.json" ] || { tail -n 5 "$work/$name.log" && exit 1; }
    figures+=("$work/$name.json")
done
exec python -m tests.releases.table "${figures[@]}"
