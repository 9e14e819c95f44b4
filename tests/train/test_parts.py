"""Frozen parts and parts with their own pace, in one process, against transformers in float64."""

import numpy as np
import pytest
import torch
from actor_case import (
    GRADIENT_STEP,
    Reference,
    gradient,
    make_config,
    make_sequences,
    weights_of,
    with_log_probs,
)
from actor_yardstick import expect_of

from perl_megatron.checkpoint.qwen25_vl_table import table
from perl_megatron.config.schema import OptimizerSection
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import read_architecture
from perl_megatron.train.actor import Actor
from perl_megatron.train.parts import multipliers, part_of

FROZEN = [("vision",), ("merger",), ("language",), ("vision", "merger"), ("vision", "language"), ("merger", "language")]


@pytest.fixture
def start(case, topology, encoder):
    def start(**sections):
        return Actor(make_config(case, **sections), topology, encoder, total_steps=10)

    return start


@pytest.fixture(scope="module")
def batch(case, topology, encoder):
    """Sequences with the log-probabilities of the initial policy, disturbed."""
    sequences = make_sequences(case, encoder)
    log_probs = Actor(make_config(case), topology, encoder, total_steps=1).log_probs(sequences)
    return with_log_probs(sequences, log_probs, log_probs, noise=0.5)


@pytest.fixture(scope="module")
def expected(case, encoder, batch):
    """Of the whole policy."""
    return expect_of(case, encoder, batch, make_config(case))


def published_part(name):
    if name.startswith("visual.merger."):
        return "merger"
    return "vision" if name.startswith("visual.") else "language"


def frozen(*parts):
    return {f"{part}_multiplier": 0.0 for part in parts}


def test_every_parameter_is_in_the_part_that_its_published_name_says(case):
    entries = table(read_architecture(case / "policy"))
    for entry in entries:
        for wrapper in ("", "module."):
            assert {part_of(wrapper + entry.megatron)} == {published_part(name) for name in entry.published}
    assert {part_of(entry.megatron) for entry in entries} == set(multipliers(OptimizerSection()))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("parts", FROZEN, ids="-".join)
def test_frozen_parts_stay_and_the_others_get_the_whole_policys_gradient(start, batch, expected, parts, recompute):
    """Also under recomputation: a checkpointed layer whose inputs need no gradient gives none to its weights."""
    actor = start(optimizer={**GRADIENT_STEP, **frozen(*parts)}, model={"recompute": recompute})
    before = weights_of(actor)
    metrics = actor.update(batch)
    expected.check_step(
        gradient(before, weights_of(actor)),
        metrics["gradient_norm"],
        pace=lambda name: 0.0 if published_part(name) in parts else 1.0,
    )


def test_a_frozen_language_model_without_images_learns_nothing_and_does_not_stumble(start, batch):
    text_only = [sequence for sequence in batch if not sequence.prompt.image_keys]
    actor = start(optimizer={**GRADIENT_STEP, **frozen("language")})
    before = weights_of(actor)
    assert actor.update(text_only)["gradient_norm"] == 0
    assert all(np.array_equal(value, before[name]) for name, value in weights_of(actor).items())


@pytest.mark.parametrize("distributed", [True, False])
def test_frozen_parts_have_no_gradient_buffer_no_moments_and_no_main_weights(start, batch, distributed):
    actor = start(model={"dtype": "bfloat16"}, optimizer={"distributed": distributed, **frozen("vision", "language")})
    actor.update(batch)
    named = dict(actor.modules[0].named_parameters())
    trained = {parameter for name, parameter in named.items() if part_of(name) == "merger"}
    assert all(hasattr(parameter, "main_grad") == (parameter in trained) for parameter in named.values())
    assert all(parameter.grad is None for parameter in named.values() if parameter not in trained)
    (chunk,) = actor.optimizer.chunks
    assert {parameter for buffer in chunk.buffers for parameter in buffer.params} == trained
    (inner,) = actor.optimizer.megatron.chained_optimizers
    num_trained = sum(parameter.numel() for parameter in trained)
    held = [parameter for group in inner.optimizer.param_groups for parameter in group["params"]]
    assert sum(parameter.numel() for parameter in held) == num_trained
    assert {parameter.dtype for parameter in held} == {torch.float32}
    assert sum(state["exp_avg"].numel() for state in inner.optimizer.state.values()) == num_trained


@pytest.mark.parametrize(
    ("parts", "tower", "features"),
    [((), True, True), (("vision",), False, True), (("vision", "merger"), False, False), (("merger",), True, True)],
)
def test_what_is_frozen_up_to_the_images_runs_without_an_autograd_graph(start, batch, parts, tower, features):
    """Whether the tower's last layer, and the features, have a backward pass."""
    actor = start(optimizer=frozen(*parts))
    seen = []
    vision = actor.modules[0].vision_model
    vision.decoder.layers[-1].register_forward_hook(lambda *call: seen.append(("tower", call[2][0].requires_grad)))
    vision.register_forward_hook(lambda *call: seen.append(("features", call[2].requires_grad)))
    actor.update(batch)
    assert set(seen) == {("tower", tower), ("features", features)}


MULTIPLIERS = {"vision_multiplier": 0.25, "merger_multiplier": 3.0, "language_multiplier": 1.0}


def test_a_multiplier_multiplies_the_step(start, batch, expected):
    actor = start(optimizer={**GRADIENT_STEP, **MULTIPLIERS})
    before = weights_of(actor)
    metrics = actor.update(batch)
    expected.check_step(
        gradient(before, weights_of(actor)),
        metrics["gradient_norm"],
        pace=lambda name: MULTIPLIERS[f"{published_part(name)}_multiplier"],
    )


def test_three_updates_of_parts_equal_adamw_with_groups(start, case, encoder, batch):
    """Warm-up, decay to a minimum, weight decay and clipping, each part with its multiple of the rate."""
    optimizer = {"learning_rate": 1e-3, "min_learning_rate": 2e-4, "schedule": "linear", "warmup_steps": 1}
    adam_settings = {"epsilon": 1e-3, "weight_decay": 0.1, "clip_gradient": 0.5}
    actor = start(optimizer={**optimizer, **adam_settings, **MULTIPLIERS, "language_multiplier": 0.0})
    initial = weights_of(actor)
    reference = Reference(case, encoder)
    trained = {name: p for name, p in reference.named() if published_part(name) != "language"}
    groups = [
        {"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0, "part": published_part(name)}
        for name, p in trained.items()
    ]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-3)
    rates = []
    for rate in (1e-3, 1e-3 - 8e-4 / 9, 1e-3 - 16e-4 / 9):
        rates.append(actor.update(batch)["learning_rate"])
        assert rates[-1] == pytest.approx(rate), "the reported rate is the unmultiplied one"
        reference.model.zero_grad()
        reference.policy_loss(batch, actor.config).backward()
        assert torch.nn.utils.clip_grad_norm_(trained.values(), 0.5) > 0.5, "the case has to be clipped"
        for group in adam.param_groups:
            group["lr"] = rate * MULTIPLIERS[f"{group['part']}_multiplier"]
        adam.step()
    found = weights_of(actor)
    for name, parameter in trained.items():
        expected = parameter.detach().numpy()
        moved = np.abs(expected - initial[name]).max()
        assert np.abs(found[name] - expected).max() < 1e-3 * moved + 3 * np.spacing(np.abs(initial[name]).max()), name
    assert all(np.array_equal(found[name], initial[name]) for name in found.keys() - trained.keys())


@pytest.mark.parametrize("distributed", [True, False])
def test_continuing_keeps_the_rates_of_parts(start, batch, tmp_path, distributed):
    rates = {"schedule": "cosine", "min_learning_rate": 1e-6, **MULTIPLIERS, "vision_multiplier": 0.0}
    sections = {"optimizer": {**rates, "distributed": distributed}}
    actor = start(**sections)
    actor.update(batch)
    checkpoint = actor.save(tmp_path, 1, {})
    expected = actor.update(batch)
    continued = start(**sections)
    continued.restore(checkpoint)
    assert continued.update(batch) == expected
    weights = weights_of(actor)
    assert all(np.array_equal(value, weights[name]) for name, value in weights_of(continued).items())


def test_a_checkpoint_is_taken_up_with_the_configured_rates_of_parts(start, batch, tmp_path):
    checkpoint = start(optimizer=MULTIPLIERS).save(tmp_path, 1, {})
    other = start(optimizer={"learning_rate": 5e-4, "min_learning_rate": 5e-5, **MULTIPLIERS})
    other.restore(checkpoint)
    bounds = {(group["max_lr"], group["min_lr"], group["lr"]) for group in other.optimizer.megatron.param_groups}
    assert bounds == {(m * 5e-4, m * 5e-5, m * 5e-4) for m in MULTIPLIERS.values()}


@pytest.mark.parametrize("multiplier", [0.0, 0.5])
def test_a_checkpoint_of_other_parts_is_refused(start, tmp_path, multiplier):
    checkpoint = start(optimizer={"merger_multiplier": multiplier}).save(tmp_path, 1, {})
    with pytest.raises(UserError, match=rf"optimizer\.merger_multiplier={multiplier}"):
        start().restore(checkpoint)
