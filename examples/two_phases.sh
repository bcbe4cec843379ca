# What the tiny runs of the systems with two phases share (vlm_14b/tiny.sh, dual_encoder/tiny.sh). Sourced, not run.
#
#   two_phases SCRIPT SYSTEM NAME [options]     NAME: of the recipe and of the output folder, such as vlm-tiny
#
# Data, tokenizer, shards; masked autoencoding of the vision tower; the joint phase, which starts from its tower; the
# report.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

two_phases() {
    local name=$3
    read_options "$1" "$2" "outputs/$name" "megatron_mm/recipes/$name.yaml" "${@:4}"
    begin shards mae run tokenizer.model results.json

    local limit=0 mae_iterations=200 prepare=(--questions 36000 --shapes 2400) training=()
    if [ $smoke ]; then
        limit=16 mae_iterations=4 prepare=(--names 24 --variants 1 --questions 64 --heldout-questions 16 --shapes 48)
        training=(--train-iters 4 --lr-warmup-iters 2)
    fi

    heading "Data: emoji art with names (npm), shapes with captions and questions (PyPI)"
    python -m examples.data.image_text --output "$output/data" --cache "$cache" "${prepare[@]}"

    train_tokenizer texts.txt 1024

    heading "Shards"
    local kind
    for kind in pairs shapes questions; do build_shards $kind shards/$kind --no-check; done
    local data=(--data-path 0.2 "$output/shards/pairs" 0.43 "$output/shards/shapes" 0.37 "$output/shards/questions")

    heading "Phase 1: masked autoencoding of the vision tower, data parallel 2"
    pretrain mae 2 "${data[@]}" --model.phase mae "${training[@]}" --train-iters $mae_iterations

    heading "Phase 2: everything, from that tower, data parallel 2"
    pretrain run 2 "${data[@]}" --init-from "$output/mae/checkpoints" --init-nodes 'vision.*' "${training[@]}"

    heading "Report on an unseen vendor's art and on questions about unseen pictures"
    report examples.two_phases $limit
}
