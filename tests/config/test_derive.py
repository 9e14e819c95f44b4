import json
from pathlib import Path

import pytest
from derive_case import TINY, config_of

from perl_megatron.config.architecture import read_architecture_numbers
from perl_megatron.config.derive import derive, require_training_data
from perl_megatron.config.layout import launched_processes
from perl_megatron.errors import UserError


def test_paper_arithmetic():
    config = config_of("rollout.questions_per_step=128", "rollout.num_rollouts=6", "algorithm.updates_per_step=2")
    derived = derive(config, world_size=4, architecture=TINY)
    assert (derived.group_size, derived.rollouts_per_step, derived.data_size) == (12, 1536, 4)
    assert (derived.questions_per_update, derived.sequences_per_update) == (64, 768)
    assert (derived.total_updates, derived.total_rollouts) == (200, 153600)
    assert (derived.engine, derived.engine_tensor_size, derived.engine_replicas) == ("embedded", 1, 4)


def test_layout():
    config = config_of("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true")
    derived = derive(config, world_size=8, architecture=TINY)
    assert (derived.tensor_size, derived.pipeline_size, derived.data_size, derived.stage_layers) == (2, 2, 2, (2, 2))
    assert launched_processes(config) == 4
    assert launched_processes(config_of("parallel.data=3")) == 3


def test_supervised_counts_demonstrations():
    config = config_of("supervised.batch_size=20", "rollout.num_rollouts=1")
    derived = derive(config, world_size=2, architecture=TINY, command="sft")
    assert (derived.sequences_per_update, derived.total_updates) == (20, 100)
    assert derived.total_rollouts == 0


@pytest.mark.parametrize(
    ("overrides", "world_size", "what", "where", "fix"),
    [
        (["parallel.context=2"], 2, "share a prompt", "actor.sharing = full, parallel.context = 2", "sharing=vision"),
        (["parallel.tensor=2"], 3, "3 processes", "parallel.tensor", "multiple of 2"),
        (["parallel.pipeline=3"], 3, "4 layers", "parallel.pipeline = 3", "1, 2, 4"),
        (
            ["rollout.questions_per_step=6", "algorithm.updates_per_step=4"],
            1,
            "6 questions",
            "updates_per_step",
            "1, 2, 3, 6",
        ),
        (
            ["rollout.num_rollouts=1", "permutation.num_permuted=0"],
            1,
            "no learning signal",
            "num_rollouts",
            "2 or more",
        ),
        (["filter.min_accuracy=0.9", "filter.max_accuracy=0.1"], 1, "at least 0.9", "min_accuracy", "smaller"),
        (["filter.min_right_per_order=4", "filter.min_wrong_per_order=3"], 1, "7 are asked for", "filter.min", "lower"),
        (["filter.carry_surplus=true"], 1, "never a surplus", "filter.oversample", "1.5"),
        (["filter.carry_surplus=true", "filter.oversample=2"], 1, "older policy", "old_policy", "=engine"),
        (["permutation.schedule=exponential"], 1, "below 1", "permutation.coefficient", "0.9"),
        (["reward.accuracy=0", "reward.format=0"], 1, "all rewards", "reward.accuracy", "above 0"),
        (["reward.accuracy=0", "reward.format=0", "reward.functions=a:b=0"], 1, "all rewards", "accuracy", "above 0"),
        (["reward.judge=0.5"], 1, "no endpoint", "judge.url", "judge.url=http"),
        (["data.min_pixels=2000", "data.max_pixels=1000"], 1, "at least 2000", "data.min_pixels", "smaller"),
        (["optimizer.min_learning_rate=1"], 1, "above the peak", "min_learning_rate", "smaller"),
        (
            ["algorithm.old_policy=engine", "algorithm.importance_correction=masked"],
            1,
            "nothing to correct",
            "algorithm.old_policy",
            "algorithm.importance_correction=off",
        ),
        (["rollout.questions_per_step=1", "rollout.num_rollouts=1"], 3, "without work", "questions_per_step", "fewer"),
    ],
)
def test_refusals(overrides, world_size, what, where, fix):
    with pytest.raises(UserError) as caught:
        derive(config_of(*overrides), world_size=world_size, architecture=TINY)
    error = caught.value
    assert what in error.what
    assert where in str(error.where)
    assert fix in str(error.fix)


def test_training_data(tmp_path):
    with pytest.raises(UserError, match="no training data"):
        require_training_data(config_of())
    with pytest.raises(UserError, match="does not exist"):
        require_training_data(config_of(f"data.train={tmp_path / 'none.jsonl'}"))
    (tmp_path / "train.jsonl").write_text("{}\n")
    require_training_data(config_of(f"data.train={tmp_path / 'train.jsonl'}"))
    with pytest.raises(UserError, match=r"data\.evaluation"):
        require_training_data(config_of(f"data.train={tmp_path / 'train.jsonl'}", "data.evaluation=none.jsonl"))


TEXT = {
    "hidden_size": 128,
    "intermediate_size": 336,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
VISION = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_heads": 4,
    "out_hidden_size": 128,
    "fullatt_block_indexes": [3],
}


@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_architecture_from_both_layouts(tmp_path, layout):
    content = {"model_type": "qwen2_5_vl", "vision_config": VISION}
    content |= TEXT if layout == "flat" else {"text_config": TEXT}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_architecture_numbers(tmp_path) == TINY


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        ("{", "not a readable JSON"),
        ("[]", "model type is None"),
        (json.dumps({"model_type": "llama", **TEXT}), "'llama'"),
        (
            json.dumps({"model_type": "qwen2_5_vl", "vision_config": VISION, **TEXT, "num_hidden_layers": 0}),
            "num_hidden_layers",
        ),
        (json.dumps({"model_type": "qwen2_5_vl", **TEXT}), "'intermediate_size' is None"),
        (json.dumps({"model_type": "qwen2_5_vl", **TEXT, "vision_config": VISION | {"depth": "4"}}), "'depth' is '4'"),
        (
            json.dumps({"model_type": "qwen2_5_vl", "text_config": TEXT | {"head_dim": 0}, "vision_config": VISION}),
            "'head_dim' is 0",
        ),
        (
            json.dumps({"model_type": "qwen2_5_vl", **TEXT, "vision_config": VISION | {"fullatt_block_indexes": 3}}),
            "'fullatt_block_indexes' is 3",
        ),
    ],
)
def test_bad_architectures(tmp_path, content, says):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=says) as error:
        read_architecture_numbers(tmp_path)
    assert error.value.fix
    if content is None:
        assert f"or make it first; paths are relative to the current directory, {Path.cwd()}" in error.value.fix


def test_an_engine_may_have_another_layout_than_the_trainer(monkeypatch):
    """Trainer tensor 2, engines of one process each; a size that does not divide is refused, naming the option."""
    monkeypatch.setattr("perl_megatron.config.derive.resolve_engine", lambda config, **_: "vllm")
    config = config_of("parallel.tensor=2", "rollout.tensor_parallel=1")
    derived = derive(config, world_size=2, architecture=TINY)
    assert (derived.engine_tensor_size, derived.engine_replicas) == (1, 2)
    assert derive(config_of("parallel.tensor=2"), world_size=4, architecture=TINY).engine_replicas == 2
    with pytest.raises(UserError, match=r"rollout\.tensor_parallel = 4"):
        derive(config_of("rollout.tensor_parallel=4"), world_size=4, architecture=TINY)


def test_evaluation_asks_nothing_of_the_training(monkeypatch):
    """It builds an engine only: the advice of those checks is to use `eval`."""
    frozen = [f"optimizer.{part}_multiplier=0" for part in ("vision", "merger", "language")]
    config = config_of(*frozen, "model.fp8=hybrid", "model.dtype=float32")
    derive(config, world_size=1, architecture=TINY, command="eval")
    for command in ("train", "sft"):
        with pytest.raises(UserError, match="all frozen"):
            derive(config, world_size=1, architecture=TINY, command=command)
        with pytest.raises(UserError, match="bfloat16 activations"):
            derive(
                config_of("model.fp8=hybrid", "model.dtype=float32"), world_size=1, architecture=TINY, command=command
            )
