#!/bin/sh
# The demo: real MNIST scans, a tiny Qwen2.5-VL with a positional bias, permuted GRPO that cures it.
# usage: sh examples/demo/run.sh RUN_NAME SEED [section.key=value ...]     (from the repository's root, in its environment)
set -eu
name=${1:-demo}; seed=${2:-0}
[ $# -gt 2 ] && shift 2 || shift $#
work="runs/demo-start-$seed"

if [ -e "runs/$name" ]; then
    echo "error: runs/$name exists. Remove it (rm -r runs/$name), or run under another name." >&2
    exit 2
fi
sh examples/demo/prepare.sh "$seed"
echo "== 4/4 permuted GRPO, 2 processes (tensor parallel), rollouts by vLLM where it is installed"
perl-megatron train examples/demo/train.yaml run.name="$name" run.seed="$seed" \
    model.path="$work/warm_start/export" data.train="$work/data/train.jsonl" \
    data.evaluation="$work/data/heldout.jsonl" "$@"
