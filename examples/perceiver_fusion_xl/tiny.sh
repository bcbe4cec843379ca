#!/usr/bin/env bash
# PerceiverFusion-XL's graph on a laptop: trains perceiver-fusion-tiny on named pictures and scores it on unseen ones.
#
#   examples/perceiver_fusion_xl/tiny.sh            about 8 minutes on two cores, downloads included
#   examples/perceiver_fusion_xl/tiny.sh --smoke    the same steps on a few samples, to see that they work
#
# Other options: --help. Ends with a table of held-out figures (results.json); fails if one is not far above its
# baseline, but not with --smoke.
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

train_tokenizer texts.txt 1280

heading "Shards: pictures with texts, and the same texts alone"
for kind in pairs shapes texts; do build_shards $kind shards/$kind --no-check; done

heading "Pretraining on 2 processes, data parallel 2"
pretrain run 2 --data-path 0.45 "$output/shards/pairs" 0.5 "$output/shards/shapes" 0.05 "$output/shards/texts" $training

heading "Report on an unseen vendor's emoji and unseen shapes"
report examples.perceiver_fusion_xl.report $limit
