#!/usr/bin/env bash
# From nothing to captions: trains synapse-tiny on emoji art and spoken names, and shows that it looks and listens.
#
#   examples/quickstart/run.sh            about a quarter of an hour on two cores, everything included
#   examples/quickstart/run.sh --smoke    the same steps on a few samples, to see that they work
#
# Options: --output DIR (default outputs/quickstart), --cache DIR (downloaded packages; default DIR/data/packages),
# --recipe FILE (default megatron_mm/recipes/synapse-tiny.yaml), --seed N (of training; default: the recipe's).
# Needs Python 3.10 or later and npm; installs espeak-ng with apt-get where it is missing. Data are kept in DIR/data:
# with them, and the environment, it runs offline. Everything else in DIR is made again on each run.
. "$(dirname "$0")/../common.sh"
read_options quickstart/run.sh synapse outputs/quickstart megatron_mm/recipes/synapse-tiny.yaml "$@"
begin shards run untrained exported exported_untrained tokenizer.model {trained,untrained}.json untrained.log \
    {captions,prompts,answers}.jsonl answers.jsonl.part results.json loss.png

# Iterations of the run, the one at which it is stopped and resumed, and what is prepared and evaluated.
if [ $smoke ]; then
    iterations=8 names=24 limit=16
    training="--optimizer.lr-warmup-iters 2 --training.eval-interval 0"
else
    iterations=$(python -c 'import sys; from megatron_mm.config.load import load_config
print(load_config(sys.argv[1]).training.train_iters)' "$recipe")
    names=256 limit=0 training=
fi
stop=$((iterations / 2))

heading "Data: emoji art (npm) and spoken names (espeak-ng)"
python -m examples.quickstart.prepare --output "$output/data" --cache "$cache" --names $names

heading "Tokenizer"
python tools/train_tokenizer.py --input "$output/data/names.txt" --vocab-size 1024 --model-type bpe \
    --output "$output/tokenizer.model"

heading "Shards"
python tools/preprocess_multimodal.py --input "$output/data/train.jsonl" --output "$output/shards" \
    --tokenizer-model "$output/tokenizer.model" --overwrite

pretrain() { # FOLDER PROCESSES [options]: the quick start's data, in the given layout
    local folder=$1 processes=$2
    shift 2
    torchrun --nproc-per-node "$processes" pretrain_multimodal.py --config "$recipe" --logging.output "$folder" \
        --data-path "$output/shards" --data.tokenizer "$output/tokenizer.model" \
        --lr-decay-iters "$iterations" $training "${seed[@]}" "$@"
}

heading "Pretraining on 4 processes, tensor parallel 2 x pipeline parallel 2, to iteration $stop of $iterations"
# One microbatch a step: on two cores a stage would wait for the other's processor anyway.
pretrain "$output/run" 4 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --train-iters "$stop" \
    --micro-batch-size 16

heading "Resuming in another layout: pipeline parallel 2 x data parallel 2, to iteration $iterations"
pretrain "$output/run" 4 --pipeline-model-parallel-size 2 --train-iters "$iterations"

heading "Converting to a Hugging Face folder"
python tools/convert_checkpoint.py export --checkpoint "$output/run" --output "$output/exported" --overwrite

heading "The untrained model, to compare with: the same seed, one step with a learning rate of zero"
pretrain "$output/untrained" 1 --train-iters 1 --lr 0 --min-lr 0 --training.eval-interval 0 >"$output/untrained.log"
python tools/convert_checkpoint.py export --checkpoint "$output/untrained" --output "$output/exported_untrained" \
    --overwrite

heading "Evaluating on held-out pairs: an unseen vendor's art, an unseen voice"
heldout=("$output/data/heldout_image.jsonl" "$output/data/heldout_sound.jsonl")
evaluate() { python tools/evaluate.py --input "${heldout[@]}" --limit $limit --max-new-tokens 16 --batch-size 64 "$@"; }
evaluate --model "$output/exported" --swap-media --json "$output/trained.json" --captions "$output/captions.jsonl"
evaluate --model "$output/exported_untrained" --json "$output/untrained.json"

heading "Generating five captions"
python examples/quickstart/report.py prompts --data "$output/data" --output "$output/prompts.jsonl"
python tools/generate.py --model "$output/exported" --input "$output/prompts.jsonl" --output "$output/answers.jsonl" \
    --media-root "$output/data" --max-new-tokens 16 >/dev/null

heading "Report"
python examples/quickstart/report.py show --folder "$output" --seconds $SECONDS ${smoke:+--no-require}
finished
