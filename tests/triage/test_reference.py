"""The reference's own parts: the nucleus and its border, 8-bit rounding, the dtype that weights are held in."""

import numpy as np
import pytest
import torch
from recorded_run import SYSTEM_PROMPT, TEMPERATURE, Transformers

from perl_megatron.data.processor import PromptEncoder
from perl_megatron.triage.cases import make_cases
from perl_megatron.triage.dump import read_rollouts
from perl_megatron.triage.policies import Policy, open_weights, whole
from perl_megatron.triage.reference import Distribution, Reference, _nucleus, round_to_8_bit


def test_the_border_of_the_nucleus_may_be_a_token_off():
    probabilities = torch.tensor([0.1, 0.5, 0.05, 0.35], dtype=torch.float64)
    for token, expected in (
        (1, [0.5 / 0.85, 1.0, 0.5 / 0.95]),
        (3, [0.35 / 0.85, 0, 0.35 / 0.95]),
        (0, [0, 0, 0.1 / 0.95]),
    ):
        values = _nucleus(probabilities.log()[None], torch.tensor([[token]]), top_p=0.8)
        assert values.exp()[0].tolist() == pytest.approx(expected)
    everything = _nucleus(probabilities.log()[None], torch.tensor([[2]]), top_p=0.999)
    assert everything.exp()[0].tolist() == pytest.approx([0.05, 0, 0.05])


def test_rounding_to_8_bits():
    values = torch.tensor([448.0, 1.0, 1.05, -0.1, 0.0]) / 64
    rounded = round_to_8_bit(values)
    assert rounded[:2].tolist() == values[:2].tolist()  # the largest is the end of the range, 1 is in it
    assert rounded[2] == values[1]  # three bits behind the point: 1.05 becomes 1
    assert (rounded - values).abs().max() <= 2**-4 * values.abs().max()
    assert round_to_8_bit(torch.zeros(3)).tolist() == [0, 0, 0]


def test_weights_are_those_that_the_run_holds(first_step, policies):
    """A run in bfloat16 rounds a checkpoint in float32; its exact reference multiplies the rounded weights exactly."""
    encoder = PromptEncoder(policies[0], system_prompt=SYSTEM_PROMPT)
    reference = Reference(
        policies[0],
        precision="float32",
        weights_dtype=torch.bfloat16,
        distribution=Distribution(TEMPERATURE, 1.0, encoder.banned_token_ids),
    )
    reference.use(whole(Policy("a", open_weights(policies[0]))))
    images = first_step.root / "rollouts" / "images"
    cases, _ = make_cases(read_rollouts(first_step.file), encoder, images, reference.positions)
    rounded = Transformers(policies[0], first_step.encoder, torch.bfloat16)
    rounded.model.float()
    unrounded = Transformers(policies[0], first_step.encoder)
    for case, row in zip(cases, first_step.rows, strict=True):
        scores = reference.score(case.plain)
        assert np.allclose(scores.trainer[:, 0], rounded.log_probs(row), atol=2e-5)
        assert not np.allclose(scores.trainer[:, 0], unrounded.log_probs(row), atol=1e-3)
