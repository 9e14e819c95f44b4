import pytest
import torch

from perl_megatron.rollout.ledger import WeightLedger, checksum, digest_weights


def weights():
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(3, 5, generator=generator), "b": torch.randn(7, generator=generator)}


def digest(values, dtype=torch.float32):
    return digest_weights(list(values), values.__getitem__, dtype=dtype)


def test_books_of_a_whole_stream():
    ledger = WeightLedger(["a", "b"], dtype=torch.bfloat16)
    passed = dict(ledger.watch(weights().items()))
    assert all(torch.equal(passed[name], tensor.bfloat16()) for name, tensor in weights().items())
    report = ledger.close(version=3)
    assert (report.num_bytes, report.num_tensors, report.version) == (2 * 22, 2, 3)
    assert ledger.digest() == digest(weights(), torch.bfloat16) != digest(weights())


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a", "c"], "no weight c"), (["a", "a"], "a came twice"), (["a"], "1 weights did not come: b")],
)
def test_each_weight_comes_exactly_once(names, message):
    ledger = WeightLedger(["a", "b"], dtype=torch.float32)

    def take() -> None:
        for _ in ledger.watch((name, torch.zeros(1)) for name in names):
            pass
        ledger.close(version=1)

    with pytest.raises(ValueError, match=message):
        take()


def test_digest_ignores_the_order_and_sees_everything_else():
    original = weights()
    assert digest(dict(reversed(original.items()))) == digest(original)
    changed = [
        {"a": original["a"], "c": original["b"]},
        {"a": original["a"].reshape(5, 3), "b": original["b"]},
        {"a": original["a"], "b": original["b"].flip(0)},
        {"a": original["a"], "b": torch.nextafter(original["b"], torch.tensor(9.0))},
    ]
    assert len({digest(values) for values in [original, *changed]}) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checksum_depends_on_values_and_places_not_on_strides(dtype):
    tensor = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert checksum(tensor) == checksum(tensor.t().contiguous().t())
    swapped = tensor.clone()
    swapped[[0, 1]] = tensor[[1, 0]]
    assert checksum(swapped) != checksum(tensor)
    assert checksum(torch.zeros(5)) != checksum(torch.zeros(6))
