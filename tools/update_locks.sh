#!/usr/bin/env bash
# Resolves every environment of this repository anew, writes locks/ and prints what changed:
#
#   tools/update_locks.sh              then run what it names at the end, and commit
#   tools/update_locks.sh --dry-run    only prints what would change
#
#   locks/torch.txt              torch, by hand: installed first, from a build for CPUs where pip is told of one
#   locks/python-3.X.txt         this package and its tests (tools/setup_env.sh)
#   locks/gpu-stack-3.X.txt      what tests/gpu_stack/run.sh has beside that
#   locks/peers-3.X.txt          the peers of benchmarks/data.py
#   locks/docker.txt             what the Dockerfile adds to its image
#   locks/lowest.txt             the lowest releases that setup.py allows, on Python 3.11 (tests/run.sh --lowest)
#   locks/releases-*.txt         other releases of transformers beside the locked one (tests/releases/run.sh)
#
# The Pythons need not be installed. Releases are those for Linux on x86-64, all of them wheels, so that nothing is built
# (flash-attn apart); what they need on other systems is the same, as far as it was looked at.
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=
case ${1:-} in
"") ;;
--dry-run) dry_run=1 ;;
*) echo "update_locks.sh: unknown option $1 (there is --dry-run)" >&2 && exit 2 ;;
esac

# The resolver and what reads setup.py, in an environment of their own.
resolver=.venv-resolver wanted="uv==0.13.9 setuptools==84.2.1"
if [ "$(cat "$resolver/installed" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $wanted"
    tools/new_venv.sh "${PYTHON:-python3}" "$resolver"
    # shellcheck disable=SC2086
    tools/pip_install.sh "$resolver/bin/python" "$wanted" $wanted
    echo "$wanted" >"$resolver/installed"
fi
python=$resolver/bin/python

new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
torch=$(cat locks/torch.txt)
backend=$(sed -n 's/^requires = \["\([^"]*\)"\].*/\1/p' pyproject.toml)

# RELEASE OF PYTHON [options of uv] <requirements: resolved, as name==version lines
resolve() {
    local release=$1
    shift
    "$resolver/bin/uv" pip compile --quiet --no-config --no-header --no-annotate --only-binary :all: --no-python-downloads \
        --python-version "$release" --python-platform x86_64-manylinux_2_28 "$@" -
}

asked() { # REQUIREMENT … -- EXTRA …: these, the build backend and setup.py's with its extras
    while [ "$1" != -- ]; do echo "$1" && shift; done
    shift
    echo "$backend"
    "$python" tools/requirements.py "$@"
}

for release in 3.10 3.11 3.12 3.13; do
    echo "resolving for Python $release"
    asked "$torch" -- test |
        resolve $release | "$python" tools/locks.py clean >"$new/python-$release.txt"

    # Beside the packages of tests (above), in their releases. Transformer Engine and FlashAttention do without what they
    # declare: stand_in.py is in the place of their CUDA libraries. triton is what torch's builds for CUDA ask for.
    # The enumerations of Transformer Engine's compiled module change between releases: stand_in.py has those of 2.20.2.
    {
        printf '%s\n' "$torch" onnxscript einops nvdlfw-inspect triton |
            resolve $release --constraints "$new/python-$release.txt"
        printf '%s\n' transformer-engine==2.20.2 flash-attn==2.8.3
    } | "$python" tools/locks.py clean --keep triton --without "$new/python-$release.txt" >"$new/gpu-stack-$release.txt"

    printf '%s\n' "$torch" webdataset==1.0.2 megatron-energon==7.4.1 pillow |
        resolve $release | "$python" tools/locks.py clean >"$new/peers-$release.txt"
done

echo "resolving for the Dockerfile"
# The image has torch 2.10.0a0 and Python 3.12, and is tested with this megatron-core by its authors.
asked torch==2.10.0 megatron-core==0.16.1 -- evaluation plot |
    resolve 3.12 | "$python" tools/locks.py clean >"$new/docker.txt"

echo "resolving the lowest releases"
asked "$torch" -- test |
    resolve 3.11 --resolution lowest-direct | "$python" tools/locks.py clean >"$new/lowest.txt"

echo "resolving other releases of transformers"
# For every Python, and so from what the oldest has; both lie over an environment of locks/python-3.X.txt.
for name in oldest=5.0.0 between=5.12.1; do
    printf '%s\n' "$torch" "transformers==${name#*=}" accelerate peft |
        resolve 3.10 | "$python" tools/locks.py clean --without "$new/python-3.10.txt" >"$new/releases-${name%=*}.txt"
done

for file in "$new"/*.txt; do
    name=locks/${file##*/}
    "$python" tools/locks.py changes "$name" "$file"
    [ $dry_run ] || cp "$file" "$name"
done
[ $dry_run ] || cat <<'EOF'

What must pass before this is committed:
    tests/run.sh                                              the tests, and tests/gpu_stack/run.sh as a part of them
    tests/run.sh --newest                                     what touches an interface, with the newest releases
    tests/run.sh --lowest                                     the same with the lowest, after a change of setup.py
    tests/releases/run.sh                                     exported folders under several releases of transformers
    PYTHON=python3.12 MEGATRON_MM_VENV=.venv-3.12 tests/run.sh    the other Pythons: 3.10, 3.12 and 3.13
    python benchmarks/data.py --cases text images             against the peers in their new releases
EOF
