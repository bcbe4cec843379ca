#!/usr/bin/env bash
# From training to answers: a system of one's own is pretrained, exported, evaluated, and answers without this package.
#
#   examples/own_system/run.sh            under two minutes on two cores
#   examples/own_system/run.sh --smoke    the same steps on a few bytes, to see that they work
#
# The data are Python's own sources.
downloads=no
. "$(dirname "$0")/../common.sh"
read_options own_system/run.sh byte_mixer outputs/own_system examples/own_system/byte-mixer.yaml "$@"
begin run exported held_out.jsonl scores.json answer_{tool,alone}.txt

prompt='import '
new_bytes=48 # as answer.py has it
if [ $smoke ]; then
    iterations=6 samples=4
    training="--optimizer.lr-warmup-iters 2 --training.eval-interval 0"
else
    iterations=100 samples=64 training=
fi
plugin=examples/own_system/byte_mixer.py

heading "Pretraining on 2 processes, pipeline parallel 2, for $iterations iterations"
torchrun --nproc-per-node 2 pretrain_multimodal.py --config "$recipe" --pipeline-model-parallel-size 2 \
    --train-iters "$iterations" --logging.output "$output/run" $training "${seed[@]}"

heading "Converting to a Hugging Face folder, with its proof"
python tools/convert_checkpoint.py export --checkpoint "$output/run" --plugins "$plugin" \
    --output "$output/exported"

heading "Evaluating on modules that were held out"
python -m examples.own_system.held_out --output "$output/held_out.jsonl" --samples "$samples"
python tools/evaluate.py --model "$output/exported" --plugins "$plugin" --input "$output/held_out.jsonl" \
    --json "$output/scores.json"

heading "An answer by tools/generate.py"
python tools/generate.py --model "$output/exported" --plugins "$plugin" --prompt "$prompt" \
    --max-new-tokens "$new_bytes" | tee "$output/answer_tool.txt"

heading "The same answer by AutoModelForCausalLM, in a process that has not this package"
python examples/own_system/answer.py "$output/exported" "$prompt" | tee "$output/answer_alone.txt"
cmp "$output/answer_tool.txt" "$output/answer_alone.txt"
finished
