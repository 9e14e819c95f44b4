import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from perl_megatron.config.schema import AlgorithmConfig
from perl_megatron.train import losses
from perl_megatron.train.batch import TrainingSequence
from perl_megatron.train.grid import lay_out_rows
from perl_megatron.train.losses import PolicyLoss, SupervisedLoss
from perl_megatron.types import EncodedPrompt

PROMPT = EncodedPrompt(np.array([1, 2]), (1, 2), (), np.zeros((0, 3), dtype=np.int64), ())
LENGTHS = (3, 1, 6, 2)


@pytest.fixture
def sequences():
    random = np.random.default_rng(0)
    return [
        TrainingSequence(
            PROMPT,
            response=np.arange(length),
            logprob_old=random.normal(-1, 1, length).astype(np.float32),
            logprob_ref=random.normal(-1, 1, length).astype(np.float32),
            advantage=float(random.normal()),
        )
        for length in LENGTHS
    ]


@pytest.fixture
def log_prob():
    return torch.from_numpy(np.random.default_rng(1).normal(-1, 1, sum(LENGTHS))).float().requires_grad_()


def evaluate(loss, sequences, log_prob, parts):
    """Total loss, its gradient, and the sums over micro-batches ``parts``."""
    ends = np.cumsum([0, *LENGTHS])
    total, sums = torch.zeros(()), dict.fromkeys(loss.names, 0.0)
    for part in parts:
        batch = lay_out_rows(
            sequences, part, length_multiple=1, pad_token_id=0, patches=None, device=torch.device("cpu")
        )
        tokens = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in part]) if part else np.zeros(0, dtype=int)
        value, found = loss(batch, log_prob[tokens], torch.ones(len(tokens)))
        assert tuple(found) == loss.names
        total = total + value
        sums = {
            name: max(sums[name], float(x)) if name.endswith("_max") else sums[name] + float(x)
            for name, x in found.items()
        }
    return total.item(), torch.autograd.grad(total, log_prob)[0], sums


ALL = [(0, 1, 2, 3)]
SPLITS = [[(0,), (1, 2), (3,)], [(0, 1), (), (2, 3)]]


@pytest.mark.parametrize(
    "settings",
    [
        *({"aggregation": aggregation} for aggregation in ("token", "sequence", "constant")),
        *({"aggregation": "sequence", "ratio": ratio} for ratio in ("sequence", "sequence_mean")),
        *({"aggregation": aggregation, "objective": "cispo"} for aggregation in ("token", "sequence", "constant")),
        {"objective": "cispo", "cispo_low": 0.3, "cispo_high": 0.2},
        {"kl_in": "reward"},
    ],
    ids=lambda settings: ", ".join(map(str, settings.values())),
)
@pytest.mark.parametrize("split", SPLITS)
def test_no_split_changes_the_policy_loss_or_its_gradient(sequences, log_prob, settings, split):
    loss = PolicyLoss(sequences, AlgorithmConfig(kl_coefficient=0.1, **settings), max_response_tokens=8)
    whole, whole_gradient, whole_sums = evaluate(loss, sequences, log_prob, ALL)
    parts, gradient, sums = evaluate(loss, sequences, log_prob, split)
    assert parts == pytest.approx(whole, rel=1e-6)
    torch.testing.assert_close(gradient, whole_gradient, rtol=0, atol=0)
    assert sums == pytest.approx(whole_sums, rel=1e-6)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_the_policy_loss_is_the_definition(sequences, log_prob, aggregation):
    algorithm = AlgorithmConfig(aggregation=aggregation, kl_coefficient=0.1)
    value, _, sums = evaluate(PolicyLoss(sequences, algorithm), sequences, log_prob, ALL)
    per_sequence, kls, flat = [], [], iter(log_prob.tolist())
    for sequence in sequences:
        losses, kl = [], []
        for old, ref in zip(sequence.logprob_old.tolist(), sequence.logprob_ref.tolist(), strict=True):
            new, advantage = next(flat), sequence.advantage
            ratio = np.exp(new - old)
            objective = min(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
            losses.append(-(max(objective, 3 * advantage) if advantage < 0 else objective))
            kl.append(np.exp(ref - new) - 1 - (ref - new))
        per_sequence.append(losses)
        kls.append(kl)
    mean = (
        (lambda x: np.mean(np.concatenate(x)))
        if aggregation == "token"
        else (lambda x: np.mean([np.mean(y) for y in x]))
    )
    assert value == pytest.approx(mean(per_sequence) + 0.1 * mean(kls), rel=1e-5)
    assert sums["policy_loss"] == pytest.approx(mean(per_sequence), rel=1e-5)
    assert sums["kl"] == pytest.approx(mean(kls), rel=1e-5)


@pytest.mark.parametrize("ratio", ["sequence", "sequence_mean"])
def test_a_responses_ratio_is_the_same_for_all_its_tokens(sequences, log_prob, ratio):
    """Value by hand: PeRL Eq. 6 and GSPO, mean over responses."""
    wide = {"clip_low": 0.9, "clip_high": 0.5, "dual_clip": None, "kl_coefficient": 0.0, "aggregation": "sequence"}
    value, _, sums = evaluate(PolicyLoss(sequences, AlgorithmConfig(ratio=ratio, **wide)), sequences, log_prob, ALL)
    ends, terms, ratios = np.cumsum([0, *LENGTHS]), [], []
    for sequence, first, end in zip(sequences, ends, ends[1:], strict=False):
        difference = log_prob.detach().numpy()[first:end].astype(np.float64) - sequence.logprob_old
        ratios.append(np.exp(difference.sum() if ratio == "sequence" else difference.mean()))
        bounded = np.clip(ratios[-1], 0.1, 1.5)
        terms.append(min(ratios[-1] * sequence.advantage, bounded * sequence.advantage))
    assert value == pytest.approx(-np.mean(terms), rel=1e-5)
    assert sums["ratio_mean"] == pytest.approx(np.dot(ratios, LENGTHS), rel=1e-5)
    assert sums["ratio_max"] == pytest.approx(max(ratios), rel=1e-5)


def corrected(sequences, **settings):
    """The sequences with importance weights, some of them 0, and the algorithm that asks for them."""
    random = np.random.default_rng(2)
    weighted = [
        replace(sequence, importance=random.uniform(0.5, 2, len(sequence.response)) * (np.arange(length) != 1))
        for sequence, length in zip(sequences, LENGTHS, strict=True)
    ]
    return weighted, AlgorithmConfig(importance_correction="masked", kl_coefficient=0.1, **settings)


@pytest.mark.parametrize(
    ("aggregation", "ratio"), [("token", "token"), ("sequence", "token"), ("sequence", "sequence_mean")]
)
@pytest.mark.parametrize("parts", [ALL, *SPLITS])
def test_importance_weighs_the_policy_term_alone_and_is_a_constant(sequences, log_prob, aggregation, ratio, parts):
    """Value and gradient from those without it: the policy term's gradient is each token's own, times its weight."""
    settings = {"aggregation": aggregation, "ratio": ratio, "clip_low": 0.8, "clip_high": 1.0}
    weighted, algorithm = corrected(sequences, **settings)
    value, gradient, sums = evaluate(PolicyLoss(weighted, algorithm), weighted, log_prob, parts)
    plain = PolicyLoss(sequences, AlgorithmConfig(kl_coefficient=0.1, **settings))
    _, plain_gradient, plain_sums = evaluate(plain, sequences, log_prob, ALL)
    no_kl = PolicyLoss(sequences, AlgorithmConfig(kl_coefficient=0.0, **settings))
    _, policy_gradient, _ = evaluate(no_kl, sequences, log_prob, ALL)
    weights = torch.from_numpy(np.concatenate([sequence.importance for sequence in weighted])).float()
    expected = weights * policy_gradient + (plain_gradient - policy_gradient)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
    assert (policy_gradient[weights == 0] != 0).any()
    unweighted = {name: x for name, x in plain_sums.items() if name not in ("loss", "policy_loss")}
    assert {name: sums[name] for name in unweighted} == pytest.approx(unweighted, rel=1e-6)
    assert value == pytest.approx(sums["policy_loss"] + 0.1 * sums["kl"], rel=1e-5)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_a_token_left_out_still_counts_in_the_denominator(sequences, log_prob, aggregation):
    """By hand, after the clip: L = Σ a_t w_t max(-ρA, -clip(ρ)A), a_t by the counts of all tokens."""
    weighted, algorithm = corrected(sequences, aggregation=aggregation, dual_clip=None)
    _, _, sums = evaluate(PolicyLoss(weighted, algorithm), weighted, log_prob, ALL)
    total, flat = 0.0, iter(log_prob.tolist())
    for sequence in weighted:
        share = sum(LENGTHS) if aggregation == "token" else len(LENGTHS) * len(sequence.response)
        for old, weight in zip(sequence.logprob_old.tolist(), sequence.importance.tolist(), strict=True):
            ratio, advantage = np.exp(next(flat) - old), sequence.advantage
            total += weight / share * max(-ratio * advantage, -np.clip(ratio, 0.8, 1.2) * advantage)
    assert sums["policy_loss"] == pytest.approx(total, rel=1e-5)


def test_weights_of_one_change_no_number(sequences, log_prob):
    ones = [replace(sequence, importance=np.ones(len(sequence.response))) for sequence in sequences]
    expected = evaluate(PolicyLoss(sequences, AlgorithmConfig()), sequences, log_prob, ALL)
    corrected_loss = PolicyLoss(ones, AlgorithmConfig(importance_correction="truncated"))
    value, gradient, sums = evaluate(corrected_loss, ones, log_prob, ALL)
    assert (value, sums) == (expected[0], expected[2])
    torch.testing.assert_close(gradient, expected[1], rtol=0, atol=0)


class Meeting:
    """Two context ranks, as threads that add up what they bring."""

    def __init__(self):
        self._barrier, self._brought = threading.Barrier(2), {}

    def all_reduce(self, tensor, group):
        self._brought[group] = tensor.clone()
        self._barrier.wait(10)
        tensor.copy_(sum(self._brought.values()))
        self._barrier.wait(10)


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_mean"])
def test_context_ranks_share_the_ratio_of_a_response(sequences, log_prob, ratio, monkeypatch):
    meeting = Meeting()
    monkeypatch.setattr(losses.dist, "all_reduce", meeting.all_reduce)
    sequences, algorithm = corrected(sequences, ratio=ratio, aggregation="sequence")
    expected, right, sums = evaluate(PolicyLoss(sequences, algorithm), sequences, log_prob, ALL)

    def run(rank):
        place = SimpleNamespace(context_size=2, context_group=lambda: rank)
        loss = PolicyLoss(sequences, algorithm, place)
        cpu = torch.device("cpu")
        batch = lay_out_rows(
            sequences, ALL[0], length_multiple=4, pad_token_id=0, patches=None, device=cpu, context=(rank, 2)
        )
        value, found = loss(batch, log_prob[batch.own_tokens], torch.ones(batch.num_tokens))
        return value, torch.autograd.grad(value, log_prob)[0], found

    with ThreadPoolExecutor(2) as pool:
        (first, gradient, sums_0), (second, other, sums_1) = pool.map(run, range(2))
    assert 0 < sums_0["entropy"] < sum(LENGTHS)
    assert (first + second).item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient + other, right, rtol=1e-6, atol=1e-8)
    assert float(sums_0["ratio_mean"] + sums_1["ratio_mean"]) == pytest.approx(sums["ratio_mean"], rel=1e-6)


def test_without_kl_no_reference_is_needed(sequences, log_prob):
    bare = [TrainingSequence(s.prompt, s.response, s.logprob_old, None, s.advantage) for s in sequences]
    _, _, sums = evaluate(PolicyLoss(bare, AlgorithmConfig(kl_coefficient=0)), bare, log_prob, ALL)
    assert sums["kl"] == 0
    assert sums["loss"] == sums["policy_loss"] != 0


def test_the_supervised_loss_is_the_mean_over_all_tokens(sequences, log_prob):
    for parts in [ALL, *SPLITS]:
        value, gradient, sums = evaluate(SupervisedLoss(sequences), sequences, log_prob, parts)
        assert value == pytest.approx(-log_prob.mean().item(), rel=1e-6)
        assert gradient.tolist() == pytest.approx([-1 / sum(LENGTHS)] * sum(LENGTHS))
        assert sums["entropy"] == sum(LENGTHS)


def test_an_update_without_old_log_probabilities_or_weights_is_a_programming_error(sequences):
    with pytest.raises(AssertionError, match="log-probabilities"):
        PolicyLoss([TrainingSequence(PROMPT, np.arange(2))], AlgorithmConfig())
    with pytest.raises(AssertionError, match="weights"):
        PolicyLoss(sequences, AlgorithmConfig(importance_correction="truncated"))
