#!/usr/bin/env bash
# From nothing to captions: trains synapse-tiny on emoji art and spoken names, and shows that it looks and listens.
#
#   examples/quickstart/run.sh            about a quarter of an hour on two cores, everything included
#   examples/quickstart/run.sh --smoke    the same steps on a few samples, to see that they work
#
# Installs espeak-ng with apt-get where it is missing; other options: --help.
. "$(dirname "$0")/../common.sh"
read_options quickstart/run.sh synapse outputs/quickstart megatron_mm/recipes/synapse-tiny.yaml "$@"
begin shards run untrained exported exported_untrained tokenizer.model {trained,untrained}.json untrained.log \
    {captions,prompts,answers}.jsonl answers.jsonl.part results.json loss.png

# Iterations of the run, the one at which it is stopped and resumed, and what is prepared and evaluated.
if [ $smoke ]; then
    iterations=8 names=24 limit=16
    training="--optimizer.lr-warmup-iters 2 --training.eval-interval 0"
else
    iterations=$(recipe_iterations)
    names=256 limit=0 training=
fi
stop=$((iterations / 2))

heading "Data: emoji art (npm) and spoken names (espeak-ng)"
python -m examples.quickstart.prepare --output "$output/data" --cache "$cache" --names $names

train_tokenizer names.txt 1024

heading "Shards"
build_shards train shards

schedule=(--data-path "$output/shards" --lr-decay-iters "$iterations" $training)
heading "Pretraining on 4 processes, tensor parallel 2 x pipeline parallel 2, to iteration $stop of $iterations"
# One microbatch a step: on two cores a stage would wait for the other's processor anyway.
pretrain run 4 "${schedule[@]}" --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --train-iters "$stop" \
    --micro-batch-size 16

heading "Resuming in another layout: pipeline parallel 2 x data parallel 2, to iteration $iterations"
pretrain run 4 "${schedule[@]}" --pipeline-model-parallel-size 2 --train-iters "$iterations"

heading "Converting to a Hugging Face folder"
python tools/convert_checkpoint.py export --checkpoint "$output/run" --output "$output/exported" --overwrite

heading "The untrained model, to compare with: the same seed, one step with a learning rate of zero"
pretrain untrained 1 "${schedule[@]}" --train-iters 1 --lr 0 --min-lr 0 --training.eval-interval 0 \
    >"$output/untrained.log"
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
