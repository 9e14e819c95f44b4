#!/bin/sh
# The demo: real MNIST scans, a tiny Qwen2.5-VL with a positional bias, permuted GRPO that cures it.
# usage: sh examples/demo/run.sh RUN_NAME SEED [section.key=value ...]     (from the repository's root, in its environment)
set -eu
name=${1:-demo}; seed=${2:-0}
[ $# -gt 2 ] && shift 2 || shift $#
work="runs/demo-start-$seed"  # data and warm start; runs with the same seed share it

if [ -e "runs/$name" ]; then
    echo "error: runs/$name exists. Remove it (rm -r runs/$name), or run under another name." >&2
    exit 2
fi
if [ -e "$work/done" ]; then
    echo "== 1-3/4 data and warm start of seed $seed are in $work"
else
    echo "== 1/4 data: questions over real handwritten digits -> $work/data"
    rm -rf "$work"
    python tools/make_digits.py "$work/data" --seed "$seed" --recipe examples/demo/digits.yaml
    echo "== 2/4 policy: a tiny Qwen2.5-VL with random weights -> $work/policy"
    python tools/make_tiny_policy.py "$work/policy" --seed "$seed" --corpus "$work/data/train.jsonl" \
        --layers 4 --intermediate 256 --vision-depth 2 --tie --rope-theta 1000000 --init-std 0.08
    echo "== 3/4 warm start on 2 processes (data parallel): right demonstrations, then biased ones"
    perl-megatron sft examples/demo/perception.yaml run.directory="$work" run.seed="$seed" \
        model.path="$work/policy" data.train="$work/data/perception.jsonl"
    perl-megatron sft examples/demo/warm_start.yaml run.directory="$work" run.seed="$seed" \
        model.path="$work/perception/export" data.train="$work/data/warm_start.jsonl"
    touch "$work/done"
fi
echo "== 4/4 permuted GRPO, 2 processes (tensor parallel), rollouts by vLLM where it is installed"
perl-megatron train examples/demo/train.yaml run.name="$name" run.seed="$seed" \
    model.path="$work/warm_start/export" data.train="$work/data/train.jsonl" \
    data.evaluation="$work/data/heldout.jsonl" "$@"
