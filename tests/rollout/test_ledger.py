import pytest
import torch

from perl_megatron.rollout.ledger import WeightLedger


def weights():
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(3, 5, generator=generator), "b": torch.randn(7, generator=generator)}


def test_books_of_a_whole_stream():
    ledger = WeightLedger(["a", "b"], dtype=torch.bfloat16)
    passed = dict(ledger.watch(weights().items()))
    assert all(torch.equal(passed[name], tensor.bfloat16()) for name, tensor in weights().items())
    report = ledger.close(version=3)
    assert (report.num_bytes, report.num_tensors, report.version) == (2 * 22, 2, 3)


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
