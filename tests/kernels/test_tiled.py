"""What only the tiles promise: bounded memory, and a token's result that depends on nothing else in its batch."""

import pytest
import torch
from live_memory import LiveMemory
from loss_case import make_case, ours

from perl_megatron.kernels import native, tiles
from perl_megatron.kernels.dispatch import score_tokens
from perl_megatron.kernels.scores import ScoreOptions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy", [True, False])
def test_memory_at_its_peak_is_what_the_documentation_says(dtype, entropy, monkeypatch):
    """Of T tokens: the gradients and the float32 one of the hidden states, some numbers for each, and the tiles."""
    monkeypatch.setattr(tiles, "NATIVE_SIDE", tiles.TOKENS)
    tokens, hidden, vocabulary = 4 * tiles.TOKENS, 128, 8 * tiles.ROWS
    case = make_case(tokens=tokens, hidden=hidden, vocabulary=vocabulary, dtype=dtype)
    options = ScoreOptions(temperature=0.9, banned_token_ids=(3,), top_k=4, entropy=entropy)
    with LiveMemory() as reference:
        ours(case, "reference", options)
    with LiveMemory() as found:
        ours(case, "tiled", options)
    logits, copies = tokens * vocabulary * 4, 0 if dtype is torch.float32 else 1
    inputs_and_gradients = 2 * (tokens + vocabulary) * hidden * case.hidden.element_size()
    expected = (
        inputs_and_gradients
        + tokens * hidden * 4 * copies
        + 2 * tiles.TOKENS * tiles.ROWS * 4
        + tiles.TOKENS * hidden * 4
        + 2 * tiles.ROWS * hidden * 4 * copies
    )
    assert found.peak <= expected + tokens * 200
    assert expected < logits / 4 < reference.peak


@pytest.mark.skipif(native.why_not() is not None, reason="no native loss kernels here")
def test_memory_of_one_tile_of_tokens_in_cpp():
    """In their true tiles: logits, their gradient and its transpose; no tile of the weight or of its gradient."""
    tokens, hidden, vocabulary = 1024, 64, 4 * tiles.NATIVE_SIDE
    case = make_case(tokens=tokens, hidden=hidden, vocabulary=vocabulary, dtype=torch.bfloat16)
    with LiveMemory() as found:
        ours(case, "tiled")
    expected = 2 * (tokens + vocabulary) * hidden * 2 + tokens * hidden * 4 + tokens * tiles.NATIVE_SIDE * (4 + 2 + 2)
    assert expected / 2 < found.peak <= expected + tokens * 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "vocabulary"), [(48, tiles.ROWS + 501), (1024, tiles.LARGE_VOCABULARY + 501)])
def test_a_tokens_scores_are_the_same_bits_whatever_else_is_in_the_batch(dtype, hidden, vocabulary):
    case = make_case(tokens=tiles.TOKENS + 77, hidden=hidden, vocabulary=vocabulary, dtype=dtype)

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
