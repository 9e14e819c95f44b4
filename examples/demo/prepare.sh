#!/bin/sh
# The demo's data and warm start of one seed, in runs/demo-start-SEED; runs with the same seed share them.
# usage: sh examples/demo/prepare.sh SEED     (from the repository's root, in its environment)
set -eu
seed=${1:-0}
work="runs/demo-start-$seed"

if [ -e "$work/done" ]; then
    echo "== 1-3/4 data and warm start of seed $seed are in $work"
    exit 0
fi
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
