#!/usr/bin/env bash
# PerceiverFusion-XL's graph on a laptop: trains perceiver-fusion-tiny on named pictures and scores it on unseen ones.
#
#   examples/perceiver_fusion_xl/tiny.sh            about 8 minutes on two cores, downloads included
#   examples/perceiver_fusion_xl/tiny.sh --smoke    the same steps on a few samples, to see that they work
#
# Options: --output DIR (default outputs/perceiver-fusion-tiny), --cache DIR (downloaded packages; default
# DIR/data/packages), --recipe FILE (default megatron_mm/recipes/perceiver-fusion-tiny.yaml), --seed N (of training;
# default: the recipe's). Needs Python 3.10 or later and npm. Data are kept in DIR/data: with them, and the environment,
# it runs offline. Everything else in DIR is made again on each run. Ends with a table of held-out figures
# (results.json); fails if one is not far above its baseline, but not with --smoke.
. "$(dirname "$0")/../common.sh"
read_options perceiver_fusion_xl/tiny.sh perceiver_fusion outputs/perceiver-fusion-tiny \
    megatron_mm/recipes/perceiver-fusion-tiny.yaml "$@"
begin shards run tokenizer.model results.json

if [ $smoke ]; then
    limit=16 prepare="--names 24 --variants 1 --shapes 48 --heldout-shapes 16"
    training="--train-iters 4 --lr-warmup-iters 2 --model.text.vocab-size 1024" # fewer words
else
    limit=0 prepare="--shapes 2400" training=
fi

heading "Data: emoji art with names (npm) and coloured shapes with captions (PyPI)"
python -m examples.data.image_text --output "$output/data" --cache "$cache" $prepare

heading "Tokenizer"
python tools/train_tokenizer.py --input "$output/data/texts.txt" --vocab-size 1280 --model-type bpe \
    --output "$output/tokenizer.model"

heading "Shards: pictures with texts, and the same texts alone"
for kind in pairs shapes texts; do
    python tools/preprocess_multimodal.py --input "$output/data/$kind.jsonl" --output "$output/shards/$kind" \
        --tokenizer-model "$output/tokenizer.model" --no-check --overwrite
done

heading "Pretraining on 2 processes, data parallel 2"
OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 pretrain_multimodal.py --config "$recipe" \
    --logging.output "$output/run" --data.tokenizer "$output/tokenizer.model" --data-path \
    0.45 "$output/shards/pairs" 0.5 "$output/shards/shapes" 0.05 "$output/shards/texts" $training "${seed[@]}"

heading "Report on an unseen vendor's emoji and unseen shapes"
python -m examples.perceiver_fusion_xl.report --folder "$output" --limit $limit --seconds $SECONDS \
    ${smoke:+--no-require}
finished
