"""The loss kernels over shards of the vocabulary, also uneven and empty ones, equal one process with all of it."""

from pathlib import Path

import pytest
import torch
from launch_ranks import launch_ranks
from loss_worker import OPTIONS, PADDING, SPLITS, case

from perl_megatron.kernels.dispatch import score_tokens
from perl_megatron.kernels.scores import ScoreOptions

WORKER = Path(__file__).with_name("loss_worker.py")
CASES = [
    (size, f"{name}, {backend}")
    for size, splits in SPLITS.items()
    for name in splits
    for backend in ("reference", "tiled")
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{world size: what each rank found}."""
    results = {}
    for size in SPLITS:
        out = tmp_path_factory.mktemp(f"ranks-{size}")
        launch_ranks(WORKER, out, log=out / "log", processes=size)
        results[size] = [torch.load(out / f"{rank}.pt") for rank in range(size)]
    return results


def whole(dtype):
    """One process, plain definition."""
    data = case().to(dtype)
    hidden, weight = data.hidden.requires_grad_(), data.weight.requires_grad_()
    scores = score_tokens(hidden, weight, data.targets, options=ScoreOptions(**OPTIONS), backend="reference")
    ((data.by_log_prob * scores.log_prob).sum() + (data.by_entropy * scores.entropy).sum()).backward()
    values = {name: value.detach() for name, value in vars(scores).items()}
    return values | {"hidden_gradient": hidden.grad, "weight_gradient": weight.grad}


@pytest.fixture(scope="module")
def exact():
    return whole(torch.float64)


@pytest.fixture(scope="module")
def allowed(exact):
    """{name: twice what float32 loses in one process}, in the Frobenius norm."""
    single = whole(torch.float32)
    return {name: 2 * (single[name].double() - exact[name].double()).norm() for name in exact}


@pytest.mark.parametrize(("size", "name"), CASES)
def test_all_ranks_find_what_one_process_does(found, exact, allowed, size, name):
    split = SPLITS[size][name.split(",")[0]]
    for rank, ranks in enumerate(found[size]):
        results = dict(ranks[name])
        first, rows = sum(split[:rank]), split[rank]
        gradient = results.pop("weight_gradient")
        assert len(gradient) == rows + PADDING
        assert not gradient[rows:].any()
        right = exact["weight_gradient"][first : first + rows]
        assert (gradient[:rows].double() - right).norm() <= allowed["weight_gradient"]
        for key in ("log_prob", "entropy", "log_sum_exp", "top_log_probs", "hidden_gradient"):
            assert results[key].isfinite().all()
            assert (results[key].double() - exact[key]).norm() <= allowed[key], key
            assert torch.equal(results[key], found[size][0][name][key]), f"ranks differ in {key}"
        assert torch.equal(results["is_top"], exact["is_top"])
        assert torch.equal(results["top_ids"], exact["top_ids"])


@pytest.mark.parametrize(("size", "name"), [case for case in CASES if case[1].endswith("tiled")])
def test_the_tiles_need_two_collectives_forward_and_one_backward(found, size, name):
    for ranks in found[size]:
        forward, backward = ranks[name]["collectives"]
        assert forward == ["all_reduce", "all_reduce", "all_gather", "all_gather"]  # the last two for top_k
        assert backward == ["all_reduce"]
