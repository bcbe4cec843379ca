#!/usr/bin/env bash
# AVT-33B's graph on a laptop: trains avt-tiny on moving emoji and their spoken names, and scores it on unseen ones.
#
#   examples/avt_33b/tiny.sh            at most 8 minutes on two cores, downloads (350 MB) included
#   examples/avt_33b/tiny.sh --smoke    the same steps on a few samples, to see that they work
#
# Options: --output DIR (default outputs/avt-tiny), --cache DIR (downloaded packages; default DIR/data/packages),
# --recipe FILE (default megatron_mm/recipes/avt-tiny.yaml), --seed N (of training; default: the recipe's). Needs Python
# 3.10 or later and npm; installs espeak-ng with apt-get where it is missing. Data are kept in DIR/data: with them, and
# the environment, it runs offline. Everything else in DIR is made again on each run. Ends with a table of held-out
# figures (results.json); fails if one is not far above its baseline, but not with --smoke.
. "$(dirname "$0")/../common.sh"
read_options avt_33b/tiny.sh avt outputs/avt-tiny megatron_mm/recipes/avt-tiny.yaml "$@"
begin shards run tokenizer.model results.json

# Iterations of the run, the one at which it is stopped and resumed, and what is prepared and scored. Tensor parallelism
# waits for the other process in every layer: on two cores that is a short part.
if [ $smoke ]; then
    iterations=8 stop=4 names=24 limit=8 training="--optimizer.lr-warmup-iters 2"
else
    iterations=$(python -c 'import sys; from megatron_mm.config.load import load_config
print(load_config(sys.argv[1]).training.train_iters)' "$recipe")
    stop=$((iterations / 20)) names=0 limit=0 training=
fi

heading "Data: moving and still emoji (npm) and spoken names (espeak-ng)"
python -m examples.data.audio_visual --output "$output/data" --cache "$cache" --names $names

heading "Tokenizer"
python tools/train_tokenizer.py --input "$output/data/names.txt" --vocab-size 1024 --model-type bpe \
    --output "$output/tokenizer.model"

heading "Shards"
python tools/preprocess_multimodal.py --input "$output/data/train.jsonl" --output "$output/shards" \
    --tokenizer-model "$output/tokenizer.model" --no-check --overwrite

pretrain() { # [options]: two processes on the run's data
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 pretrain_multimodal.py --config "$recipe" \
        --logging.output "$output/run" --data-path "$output/shards" --data.tokenizer "$output/tokenizer.model" \
        --lr-decay-iters "$iterations" $training "${seed[@]}" "$@"
}

heading "Pretraining, tensor parallel 2, to iteration $stop of $iterations"
pretrain --tensor-model-parallel-size 2 --train-iters "$stop"

heading "Resuming in another layout: data parallel 2, to iteration $iterations"
pretrain --micro-batch-size 16 --train-iters "$iterations"

heading "Report on held-out clips and an unseen voice"
python -m examples.avt_33b.report --folder "$output" --limit $limit --seconds $SECONDS ${smoke:+--no-require}
finished
