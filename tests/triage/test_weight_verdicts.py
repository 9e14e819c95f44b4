"""Stale weights, whole and by parts, with transformers or an engine that really has them."""

import pytest
import torch
from looking import ENGINE, TRAINER, broken, causes, look, verdict
from recorded_run import SHAPE, Transformers, make_policies, mixed, record_run
from safetensors.torch import load_file
from tiny_checkpoint import make_policy


def test_stale_weights(second_step, policies, tmp_path):
    """The engine did not take up the weights of version 1: it still samples with version 0."""
    assert look(second_step, policy=policies[1]).agrees
    stale = Transformers(policies[0], second_step.encoder)
    report = look(broken(second_step, tmp_path, ENGINE, stale.log_probs), policy=policies[1])
    assert causes(report) == {"engine": ["weights"], "trainer": []}
    assert [each.name for each in verdict(report, "engine").winners] == [
        f"all weights are those of version 0 ({policies[0]})"
    ]


@pytest.mark.parametrize(
    ("part", "takes"),
    [
        ("output layer", lambda name: name == "lm_head.weight"),
        ("vision tower and merger", lambda name: "visual." in name),
        ("language model", lambda name: "visual." not in name),
    ],
)
def test_a_stale_part(second_step, policies, tmp_path, part, takes):
    stale = mixed(tmp_path / "stale", policies[1], policies[0], takes)
    run = broken(second_step, tmp_path, ENGINE, Transformers(stale, second_step.encoder).log_probs)
    report = look(run, policy=policies[1])
    assert causes(report) == {"engine": ["weights"], "trainer": []}
    assert [each.name for each in verdict(report, "engine").winners] == [
        f"{part}: weights of version 0 ({policies[0]})"
    ]


def test_a_stale_copy_of_a_tied_output_layer(tmp_path):
    """As vLLM 0.32 on a CPU: the embedding is renewed, the output layer's repacked copy of it is not."""
    first, second = make_policies(tmp_path, tie=True)
    run = record_run(tmp_path, first, second, step=2)
    assert look(run, policy=second).agrees
    stale = Transformers(second, run.encoder)
    stale.model.lm_head.weight = torch.nn.Parameter(load_file(first / "model.safetensors")["model.embed_tokens.weight"])
    report = look(broken(run, tmp_path, ENGINE, stale.log_probs), policy=second)
    assert causes(report) == {"engine": ["weights"], "trainer": []}
    assert [each.name for each in verdict(report, "engine").winners] == [
        f"output layer: weights of version 0 ({first})"
    ]


def test_weights_that_only_the_command_line_names(first_step, tmp_path):
    """Without them nothing reproduces the numbers, and the gap is larger than any rounding."""
    other = make_policy(tmp_path / "other", seed=7, **SHAPE)
    run = broken(first_step, tmp_path, ENGINE, Transformers(other, first_step.encoder).log_probs)
    report = look(run)
    assert causes(report) == {"engine": ["unexplained"], "trainer": []}
    assert "No hypothesis reproduces the numbers" in report.render()
    assert verdict(report, "engine").winners == ()
    report = look(run, others=[other])
    assert causes(report) == {"engine": ["weights"], "trainer": []}


def test_a_real_engine_with_old_weights(second_step, policies, tmp_path):
    """The embedded engine after an update that left the output layer out, sampling by itself."""
    stale = mixed(tmp_path / "stale", policies[1], policies[0], lambda name: name == "lm_head.weight")
    run = record_run(tmp_path, policies[0], stale, step=2)
    right = Transformers(policies[1], run.encoder)
    run.rewrite(lambda row: {TRAINER: right.log_probs(row)})
    report = look(run, policy=policies[1])
    assert causes(report) == {"engine": ["weights"], "trainer": []}
    assert verdict(report, "engine").winners[0].name.startswith("output layer")
