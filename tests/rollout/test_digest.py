import pytest
import torch

from perl_megatron.rollout.digest import as_matrix, checksum, digest_weights


def weights():
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(3, 5, generator=generator), "b": torch.randn(7, generator=generator)}


def digest(values, dtype=torch.float32):
    return digest_weights(list(values), values.__getitem__, dtype=dtype)


def test_digest_ignores_the_order_and_sees_everything_else():
    original = weights()
    assert digest(dict(reversed(original.items()))) == digest(original) != digest(original, torch.bfloat16)
    changed = [
        {"a": original["a"], "c": original["b"]},
        {"a": original["a"].reshape(5, 3), "b": original["b"]},
        {"a": original["a"], "b": original["b"].flip(0)},
        {"a": original["a"], "b": torch.nextafter(original["b"], torch.tensor(9.0))},
    ]
    assert len({digest(values) for values in [original, *changed]}) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checksum_depends_on_values_and_places_not_on_strides(dtype):
    matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert checksum(matrix) == checksum(matrix.t().contiguous().t())
    for changed in (matrix.roll(1, 0), matrix.roll(1, 1), matrix * 1.5):
        assert checksum(changed) != checksum(matrix)
    assert checksum(torch.ones(5, 1)) != checksum(torch.ones(6, 1))


def test_checksums_of_parts_add_up(monkeypatch):
    matrix = torch.randn(300, 70, generator=torch.Generator().manual_seed(2)).bfloat16()
    parts = [
        checksum(matrix[row : row + 77, column : column + 41], row, column)
        for row in range(0, 300, 77)
        for column in range(0, 70, 41)
    ]
    assert sum(parts) % (1 << 64) == checksum(matrix)
    monkeypatch.setattr("perl_megatron.rollout.digest._CHUNK", 1000)
    assert checksum(matrix) == sum(parts) % (1 << 64)


def test_every_single_bit_counts_but_the_sign_of_zero():
    matrix = torch.randn(9, 7, generator=torch.Generator().manual_seed(3)).bfloat16()
    expected = checksum(matrix)
    bits = matrix.view(torch.int16)
    for bit in range(15):
        bits[4, 5] ^= 1 << bit
        assert checksum(matrix) != expected
        bits[4, 5] ^= 1 << bit
    zeros = torch.zeros(3, 3)
    assert checksum(-zeros) == checksum(zeros)
    assert as_matrix(torch.ones(4)).shape == (4, 1)
    assert as_matrix(torch.tensor(1.0)).shape == (1, 1)
