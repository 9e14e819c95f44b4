"""What only the tiles promise: bounded memory, and a token's result that depends on nothing else in its batch."""

import pytest
import torch
from loss_case import make_case, ours
from torch.utils._python_dispatch import TorchDispatchMode

from perl_megatron.kernels import tiles
from perl_megatron.kernels.dispatch import score_tokens
from perl_megatron.kernels.scores import ScoreOptions


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that an operation made (views of others not counted)."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if torch.is_tensor(each) and not each._is_view():
                self.largest = max(self.largest, each.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_tile_of_logits(dtype):
    case = make_case(tokens=3 * tiles.TOKENS, hidden=16, vocabulary=5 * tiles.ROWS, dtype=dtype)
    with LargestTensor() as reference:
        ours(case, "reference")
    with LargestTensor() as found:
        ours(case, "tiled", ScoreOptions(temperature=0.9, banned_token_ids=(3,), top_k=4))
    assert reference.largest == 15 * tiles.TOKENS * tiles.ROWS
    assert found.largest == tiles.TOKENS * tiles.ROWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [48, 1024])
def test_a_tokens_scores_are_the_same_bits_whatever_else_is_in_the_batch(dtype, hidden):
    case = make_case(tokens=2 * tiles.TOKENS + 77, hidden=hidden, vocabulary=tiles.ROWS + 501, dtype=dtype)

    def score(tokens):
        options = ScoreOptions(temperature=0.9, top_k=3)
        return score_tokens(case.hidden[tokens], case.weight, case.targets[tokens], options=options, backend="tiled")

    whole = score(slice(None))
    generator = torch.Generator().manual_seed(0)
    subsets = [torch.randperm(len(case.targets), generator=generator)[:size] for size in (1, 2, 7, 100, 300, 589)]
    for tokens in subsets:
        for name, found in vars(score(tokens)).items():
            assert torch.equal(found, getattr(whole, name)[tokens]), f"{name} of {len(tokens)} tokens"


def test_a_repeated_pass_gives_the_same_bits():
    case = make_case(tokens=300, hidden=64, vocabulary=5003, dtype=torch.float32)
    first, second = (ours(case, "tiled")[0] for _ in range(2))
    for name, value in vars(first).items():
        assert torch.equal(value, getattr(second, name)), name
