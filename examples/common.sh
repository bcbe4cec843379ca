# What the examples that run from nothing share (quickstart/run.sh, */tiny.sh): options and their help, headings,
# environment, output folder, and the steps that are the same in all. Sourced, not run; everything after it happens in
# the root of the repository.
#
#   read_options SCRIPT SYSTEM OUTPUT RECIPE "$@"    SCRIPT below examples/, whose comment begins the help; the defaults
#   begin ITEM...                                    the environment; the output folder without an earlier run's ITEMs
#   train_tokenizer TEXTS SIZE                       of a file of the data, with SIZE pieces: tokenizer.model
#   build_shards SAMPLES SHARDS [options]            of a JSONL of the data (without its ending), in that folder
#   pretrain FOLDER PROCESSES [options]              a run of the recipe, with --data-path among the options
#   recipe_iterations                                training.train_iters of the recipe
#   report MODULE LIMIT                              the table of held-out figures that ends a tiny run
#
# Sets output, recipe, cache, smoke (1 or empty) and seed (options for pretrain_multimodal.py, or none).
#
# Nothing of the user's is removed: an output folder has a marker with the name of its script. Another folder that is not
# empty is refused, and so is what is left of a path when a variable in it was not set.
set -euo pipefail
cd "$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")" && pwd)/.."

MARKER=.megatron_mm-output
downloads=${downloads:-yes} # a script that needs nothing of the registries says no before it reads this

heading() { printf '\n== %s  [%d:%02d]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }
usage() { echo "${script##*/}: $1 (see --help)" >&2 && exit 2; }
finished() { printf '\nDone in %d:%02d; everything is in %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$output"; }

read_options() {
    local number='' defaults=("$3" "$4")
    script=$1 system=$2 output=$3 recipe=$4 cache='' smoke='' seed=()
    shift 4
    while [ $# -gt 0 ]; do
        case $1 in
        --smoke) smoke=1 ;;
        --output | --recipe | --cache | --seed)
            [ $# -gt 1 ] || usage "$1 needs a value"
            [ -n "$2" ] || usage "$1 is empty; is the variable set from which it comes?"
            case $1:$2 in
            --seed:*) number=$2 ;;
            *:-*) usage "$1 needs a value, and $2 is none" ;;
            --output:*) output=$(without_slash "$2") ;;
            --recipe:*) recipe=$2 ;;
            --cache:*) cache=$(without_slash "$2") ;;
            esac
            shift
            ;;
        -h | --help) options_help "${defaults[@]}" && exit 0 ;;
        *) usage "unknown option $1" ;;
        esac
        shift
    done
    [ -f "$recipe" ] || usage "--recipe $recipe: there is no such file"
    if [ -n "$number" ]; then # of at most ten digits: longer ones overflow the shell's comparison
        [[ $number =~ ^[0-9]{1,10}$ ]] && [ "$((10#$number))" -le 2147483647 ] ||
            usage "--seed $number: it must be a whole number from 0 to 2147483647"
        seed=(--training.seed "$((10#$number))")
    fi
    check_output
    cache=${cache:-$output/data/packages}
    [ "$(place_of "$cache")" != / ] || usage "--cache $cache: the root is no place for packages"
    [ -d "$cache" ] || [ ! -e "$cache" ] || usage "--cache $cache: it is no folder"
}

options_help() { # OUTPUT RECIPE: the script's own comment, and what all scripts take
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "examples/$script"
    printf '\n  --output DIR     default %s\n' "$1"
    if [ "$downloads" = no ]; then
        echo "  --cache DIR      of no use here: nothing is downloaded"
    else
        echo "  --cache DIR      downloaded packages; default DIR/data/packages of the output"
    fi
    cat <<END
  --recipe FILE    default $2
  --seed N         of training; default: the recipe's
  --smoke          see above

END
    if [ "$downloads" = no ]; then
        echo "Needs Python 3.10 or later. Everything in the output folder is made again on each run."
    else
        echo "Needs Python 3.10 or later and npm. Data are kept in DIR/data of the output: with them, and the environment,"
        echo "it runs offline. Everything else there is made again on each run."
    fi
}

without_slash() { # PATH: without slashes at its end, which would make a file look like nothing; the root stays
    local ending=${1##*[!/]}
    [ "$1" = "$ending" ] && echo / || echo "${1%"$ending"}"
}

place_of() { # PATH: of a folder, links followed; nothing if there is no folder
    local place
    [ -d "$1" ] || return 0
    place=$(CDPATH='' cd -- "$1" && pwd -P)
    echo "${place/#\/\///}" # POSIX lets // be another root
}

check_output() { # ends the script if the output folder is no place for an output, or another's
    local place owner=''
    place=$(place_of "$output")
    if [ -z "$place" ]; then
        [ ! -e "$output" ] && [ ! -L "$output" ] || usage "--output $output: it is no folder"
        return 0
    fi
    [ "$place" != / ] || usage "--output $output: the root is no place for an output"
    [ "$place" != "$(pwd -P)" ] || usage "--output $output: the repository itself is no place for an output"
    [ "$place" != "$(place_of "${HOME:-/}")" ] || usage "--output $output: the home folder is no place for an output"
    [ ! -f "$output/$MARKER" ] || owner=$(cat "$output/$MARKER")
    if [ -n "$owner" ]; then
        [ "$owner" = "examples/$script" ] || usage "--output $output: it is the output folder of $owner"
    elif [ -n "$(ls -A "$output" | grep -vx "$MARKER")" ] && ! is_earlier; then
        usage "--output $output: it is not empty, and no output folder of examples/$script (it has no $MARKER)"
    fi
}

is_earlier() { # whether an earlier version of this script, which left no marker, made the output folder
    local phase trained
    if [ "$(ls -A "$output")" = data ]; then # interrupted before its preparation was complete
        [ -n "$(ls -A "$output/data" | grep -vxE 'packages|images|sounds|clips')" ] || return 0
    fi
    grep -qs '^emoji-datasource-google ' "$output/data/LICENCES.txt" || return 1
    for phase in mae run; do
        [ -e "$output/$phase" ] || continue
        trained=$(sed -n 's/^  system: //p' "$output/$phase/config.yaml") || return 1
        [ "${trained:-synapse}" = "$system" ] || return 1
    done
}

begin() { # ITEM...: see above
    local item
    heading "Environment"
    . tools/setup_env.sh
    mkdir -p "$output"
    check_output # again: only now there is a folder if there was none, which a/.. may be
    [ -s "$output/$MARKER" ] || echo "examples/$script" >"$output/$MARKER"
    for item in "$@"; do rm -rf "${output:?}/$item"; done
}

train_tokenizer() { # TEXTS SIZE: see above
    heading "Tokenizer"
    python tools/train_tokenizer.py --input "$output/data/$1" --vocab-size "$2" --model-type bpe \
        --output "$output/tokenizer.model"
}

build_shards() { # SAMPLES SHARDS [options]: see above
    python tools/preprocess_multimodal.py --input "$output/data/$1.jsonl" --output "$output/$2" \
        --tokenizer-model "$output/tokenizer.model" --overwrite "${@:3}"
}

pretrain() { # FOLDER PROCESSES [options]: see above
    OMP_NUM_THREADS=1 torchrun --nproc-per-node "$2" pretrain_multimodal.py --config "$recipe" \
        --logging.output "$output/$1" --data.tokenizer "$output/tokenizer.model" "${seed[@]}" "${@:3}"
}

recipe_iterations() {
    python -c 'import sys; from megatron_mm.config.load import load_config
print(load_config(sys.argv[1]).training.train_iters)' "$recipe"
}

report() { # MODULE LIMIT: see above
    python -m "$1" --folder "$output" --limit "$2" --seconds $SECONDS ${smoke:+--no-require}
    finished
}
