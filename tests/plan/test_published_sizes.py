"""The shipped training configs of the four published sizes are possible layouts, with the paper's batch arithmetic."""

import json
from pathlib import Path

import pytest

from perl_megatron.cli import main
from perl_megatron.config.architecture import read_architecture_numbers
from perl_megatron.config.load import load_config

EXAMPLES = Path(__file__).parents[2] / "examples" / "qwen2_5_vl"
GPUS_OF_A_NODE = 8


def plan(capsys, size: str, *overrides: str) -> dict:
    arguments = [str(EXAMPLES / f"{size}.yaml"), f"model.path={EXAMPLES / size}", "rollout.engine=embedded", *overrides]
    assert main(["plan", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("size", "nodes", "data", "layers"),
    [("3b", 1, 4, [36]), ("7b", 1, 2, [28]), ("32b", 4, 2, [28, 36]), ("72b", 8, 2, [17, 21, 21, 21])],
)
def test_the_plan_fills_whole_nodes(capsys, size, nodes, data, layers):
    found = plan(capsys, size)
    layout, ranks = found["layout"], found["ranks"]
    assert layout["world_size"] == len(ranks) == nodes * GPUS_OF_A_NODE
    assert layout["tensor_size"] * layout["pipeline_size"] * layout["data_size"] == layout["world_size"]
    assert layout["data_size"] == data
    assert GPUS_OF_A_NODE % layout["tensor_size"] == 0  # a tensor group never leaves its node
    assert layout["stage_layers"] == layers
    assert sum(layers) == read_architecture_numbers(EXAMPLES / size).num_layers
    assert sum(rank["vision"] for rank in ranks) == sum(rank["logits"] for rank in ranks) == 8 * nodes // len(layers)


@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
def test_the_arithmetic_is_the_papers(capsys, size):
    batch = plan(capsys, size)["batch"]
    assert batch["group_size"] == 12
    assert batch["rollouts_per_step"] == 128 * 12
    assert batch["sequences_per_update"] * batch["updates_per_step"] == batch["rollouts_per_step"]
    assert 2 * 58_000 - 128 < batch["total_questions"] <= 2 * 58_000
    assert batch["max_sequence_tokens"] == 8192 + 2048


@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
def test_an_engine_has_whole_heads(size):
    rollout = load_config(EXAMPLES / f"{size}.yaml").config.rollout
    numbers = read_architecture_numbers(EXAMPLES / size)
    assert rollout.tensor_parallel is not None
    assert numbers.num_heads % rollout.tensor_parallel == numbers.num_kv_heads % rollout.tensor_parallel == 0


@pytest.mark.parametrize(("size", "tensor", "part"), [("3b", 4, "key-value heads"), ("7b", 8, "vision feed-forward")])
def test_a_wider_split_is_refused_with_the_reason(capsys, size, tensor, part):
    arguments = ["plan", str(EXAMPLES / f"{size}.yaml"), f"model.path={EXAMPLES / size}", "parallel.data=1"]
    assert main([*arguments, f"parallel.tensor={tensor}"]) != 0
    assert part in capsys.readouterr().err
