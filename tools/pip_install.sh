#!/usr/bin/env bash
# pip install that says nothing where it works, and where it does not ends with one line on what could not be had:
#
#   tools/pip_install.sh PYTHON "WHAT" WORDS OF PIP …      WHAT as a person would call it
set -uo pipefail
python=$1 what=$2
shift 2

said=$(mktemp)
trap 'rm -f "$said"' EXIT
if { "$python" -m pip install --quiet "$@" 2>&1 >&3 | tee "$said" >&2; } 3>&1; then
    exit 0
fi
lacking=$(sed -n 's/.*No matching distribution found for //p' "$said" | tail -n 1)
if grep -qE 'Retry\(total=0,|Max retries exceeded' "$said"; then
    reason="the package index could not be reached"
elif grep -q 'from versions: none' "$said"; then
    reason="the package index could not be reached, or has no $lacking for $("$python" -V)"
elif [ -n "$lacking" ]; then
    reason="the package index has no $lacking for $("$python" -V)"
else
    reason="pip says why above"
fi
echo "error: could not install $what: $reason" >&2
exit 1
