#!/usr/bin/env bash
# AVT-33B's graph on a laptop: trains avt-tiny on moving emoji and their spoken names, and scores it on unseen ones.
#
#   examples/avt_33b/tiny.sh            at most 8 minutes on two cores, downloads (350 MB) included
#   examples/avt_33b/tiny.sh --smoke    the same steps on a few samples, to see that they work
#
# Installs espeak-ng with apt-get where it is missing; other options: --help. Ends with a table of held-out figures
# (results.json); fails if one is not far above its baseline, but not with --smoke.
. "$(dirname "$0")/../common.sh"
read_options avt_33b/tiny.sh avt outputs/avt-tiny megatron_mm/recipes/avt-tiny.yaml "$@"
begin shards run tokenizer.model results.json

# Iterations of the run, the one at which it is stopped and resumed, and what is prepared and scored. Tensor parallelism
# waits for the other process in every layer: on two cores that is a short part.
if [ $smoke ]; then
    iterations=8 stop=4 names=24 limit=8 training="--optimizer.lr-warmup-iters 2"
else
    iterations=$(recipe_iterations)
    stop=$((iterations / 20)) names=0 limit=0 training=
fi

heading "Data: moving and still emoji (npm) and spoken names (espeak-ng)"
python -m examples.data.audio_visual --output "$output/data" --cache "$cache" --names $names

train_tokenizer names.txt 1024

heading "Shards"
build_shards train shards --no-check

schedule=(--data-path "$output/shards" --lr-decay-iters "$iterations" $training)
heading "Pretraining, tensor parallel 2, to iteration $stop of $iterations"
pretrain run 2 "${schedule[@]}" --tensor-model-parallel-size 2 --train-iters "$stop"

heading "Resuming in another layout: data parallel 2, to iteration $iterations"
pretrain run 2 "${schedule[@]}" --micro-batch-size 16 --train-iters "$iterations"

heading "Report on held-out clips and an unseen voice"
report examples.avt_33b.report $limit
