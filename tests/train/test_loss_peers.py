"""Value and gradient of the policy loss against TRL's own loss function, for every published form that both have."""

import numpy as np
import pytest
import torch
import trl_peer

from perl_megatron.config.schema import AlgorithmConfig
from perl_megatron.train.batch import TrainingSequence
from perl_megatron.train.grid import lay_out_rows
from perl_megatron.train.losses import PolicyLoss
from perl_megatron.types import EncodedPrompt

PROMPT = EncodedPrompt(np.array([1, 2]), (1, 2), (), np.zeros((0, 3), dtype=np.int64), ())
LENGTHS = (3, 1, 6, 2, 5)
LIMIT = 8
WITHOUT_IMAGES = {"length_multiple": 1, "pad_token_id": 0, "patches": None, "device": torch.device("cpu")}
PLAIN = {"dual_clip": None, "kl_coefficient": 0.0}
FORMS = {
    "grpo": (PLAIN | {"aggregation": "sequence"}, {}),
    "grpo with KL": (PLAIN | {"aggregation": "sequence", "kl_coefficient": 0.04}, {"beta": 0.04}),
    "dapo": (PLAIN | {"clip_high": 0.28}, {"loss_type": "dapo", "high": 0.28}),
    "dr_grpo": (PLAIN | {"aggregation": "constant"}, {"loss_type": "dr_grpo", "max_completion_length": LIMIT}),
    "dr_grpo with KL": (
        PLAIN | {"aggregation": "constant", "kl_coefficient": 0.1},
        {"loss_type": "dr_grpo", "max_completion_length": LIMIT, "beta": 0.1},
    ),
    "gspo": (
        PLAIN | {"aggregation": "sequence", "ratio": "sequence_mean", "clip_low": 0.1, "clip_high": 0.15},
        {"level": "sequence", "low": 0.1, "high": 0.15},
    ),
    "cispo": (PLAIN | {"objective": "cispo", "cispo_high": 0.5}, {"loss_type": "cispo", "high": 1.5}),
}
"""Name: our settings, and TRL's. CISPO's upper bound is 1 + ε here, and TRL's ``epsilon_high`` itself."""


def case(seed: int):
    random = np.random.default_rng(seed)
    sequences = [
        TrainingSequence(
            PROMPT,
            response=np.arange(length),
            logprob_old=random.normal(-1, 0.3, length).astype(np.float32),
            logprob_ref=random.normal(-1, 0.3, length).astype(np.float32),
            advantage=float(np.float32(random.normal())),
        )
        for length in LENGTHS
    ]
    return sequences, torch.from_numpy(random.normal(-1, 0.3, sum(LENGTHS)).astype(np.float32))


def padded(rows) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradient_are_trls(form, seed):
    settings, theirs = FORMS[form]
    sequences, values = case(seed)
    ours = values.clone().requires_grad_()
    loss = PolicyLoss(sequences, AlgorithmConfig(**settings), max_response_tokens=LIMIT)
    batch = lay_out_rows(sequences, range(5), **WITHOUT_IMAGES)
    value, _ = loss(batch, ours, torch.zeros(len(ours)))
    peer = values.clone().requires_grad_()
    expected = trl_peer.loss(
        padded(peer.split(LENGTHS)),
        padded([sequence.logprob_old for sequence in sequences]),
        padded([torch.ones(length) for length in LENGTHS]),
        torch.tensor([sequence.advantage for sequence in sequences]),
        ref=padded([sequence.logprob_ref for sequence in sequences]),
        **theirs,
    )
    assert value.item() == pytest.approx(expected.item(), rel=2e-6, abs=1e-7)
    (gradient,), (right,) = torch.autograd.grad(value, ours), torch.autograd.grad(expected, peer)
    torch.testing.assert_close(gradient, right, rtol=2e-5, atol=1e-8)
    assert (gradient != 0).any()


def test_a_kl_in_the_reward_is_not_in_the_loss_too():
    sequences, values = case(0)
    batch = lay_out_rows(sequences, range(5), **WITHOUT_IMAGES)
    results = []
    for settings in ({"kl_in": "reward", "kl_coefficient": 0.5}, {"kl_coefficient": 0.0}):
        log_prob = values.clone().requires_grad_()
        loss, sums = PolicyLoss(sequences, AlgorithmConfig(**settings))(batch, log_prob, torch.zeros(len(values)))
        results.append((loss.item(), torch.autograd.grad(loss, log_prob)[0].tolist(), float(sums["kl"])))
    assert results[0] == results[1]
    assert results[0][2] == 0
