"""Attention with shared prompts against attention of whole sequences, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.functional import scaled_dot_product_attention

from perl_megatron.model.attention import TorchCoreAttention
from perl_megatron.model.layer_specs import attend_with_shared_prompts
from perl_megatron.model.shared_prompts import AttentionBlock, share_prompts

HEADS, GROUPS, SIZE = 4, 2, 8
CPU = torch.device("cpu")

CASES = {
    "one prompt": ([5], [[3, 1, 4]]),
    "ragged": ([9, 2, 30], [[1, 40], [7], [2, 2, 2]]),
    "no responses": ([4, 1], [[], []]),
    "some prompts without responses": ([4, 6, 3], [[], [2, 5], []]),
    "long and short apart": ([100, 3, 101, 90], [[60, 1], [2], [2, 61], []]),
    "a token each": ([1], [[1]]),
}


def attention():
    """TorchCoreAttention without megatron-core's configuration, of which it reads only a few numbers."""
    module = TorchCoreAttention.__new__(TorchCoreAttention)
    torch.nn.Module.__init__(module)
    module.attn_mask_type, module.context_group, module.scale = AttnMaskType.causal, None, SIZE**-0.5
    return module


def varlen(query, key, value, *, attn_mask_type, packed_seq_params):
    """Attention over segments of varying length, as TransformerEngine's: [N, heads, D] → [N, heads · D]."""
    bottom_right = attn_mask_type.name == "padding_causal_bottom_right"
    assert bottom_right or attn_mask_type is AttnMaskType.causal
    assert packed_seq_params.qkv_format == "thd"
    queries, keys = packed_seq_params.cu_seqlens_q.diff(), packed_seq_params.cu_seqlens_kv.diff()
    assert packed_seq_params.cu_seqlens_q.dtype is torch.int32
    assert (int(queries.max()), int(keys.max())) == (packed_seq_params.max_seqlen_q, packed_seq_params.max_seqlen_kv)
    assert (int(queries.sum()), int(keys.sum())) == (len(query), len(key))
    outputs = []
    parts = (tensor.split(lengths.tolist()) for tensor, lengths in ((query, queries), (key, keys), (value, keys)))
    for q, k, v in zip(*parts, strict=True):
        before = len(k) - len(q) if bottom_right else 0
        mask = torch.arange(len(k)) <= before + torch.arange(len(q))[:, None]
        outputs.append(one_sequence(q, k, v, mask))
    return torch.cat(outputs).flatten(1)


def one_sequence(query, key, value, mask):
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SIZE**-0.5, enable_gqa=True)
    return output[0].transpose(0, 1)


def by_whole_sequences(query, key, value, prompts, responses):
    """Every prompt, and every response with its own copy of the prompt, which counts for the response only."""
    starts = np.cumsum(prompts) - prompts
    outputs, behind, start = [], [], sum(prompts)
    for prompt_start, prompt, own in zip(starts, prompts, responses, strict=True):
        places = np.arange(prompt_start, prompt_start + prompt)
        outputs.append(causal(query, key, value, places))
        for length in own:
            whole = np.concatenate([places, np.arange(start, start + length)])
            behind.append(causal(query, key, value, whole)[prompt:])
            start += length
    return torch.cat([*outputs, *behind]).flatten(1)


def causal(query, key, value, places):
    mask = torch.ones(len(places), len(places), dtype=torch.bool).tril()
    return one_sequence(query[places], key[places], value[places], mask)


def inputs(length, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((length, HEADS, SIZE), (length, GROUPS, SIZE), (length, GROUPS, SIZE))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def ours(qkv, segments):
    return attention()(*(tensor[:, None] for tensor in qkv), packed_seq_params=segments)[:, 0]


def by_two_calls(qkv, segments):
    return attend_with_shared_prompts(varlen, *qkv, segments)


def check(attend, prompts, responses, padding):
    used = sum(prompts) + sum(map(sum, responses))
    segments = share_prompts(prompts, responses, row_length=used + padding, device=CPU)
    qkv = inputs(used + padding)
    expected = by_whole_sequences(*qkv, prompts, responses)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((expected * weight).sum(), qkv)
    found = attend(qkv, segments)
    assert found.shape == (used + padding, HEADS * SIZE)
    assert not found[used:].any(), "padding"
    torch.testing.assert_close(found[:used], expected, rtol=0, atol=1e-12)
    for mine, right in zip(torch.autograd.grad((found[:used] * weight).sum(), qkv), gradients, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attend", [ours, by_two_calls], ids=["torch", "TransformerEngine's two calls"])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(("prompts", "responses"), CASES.values(), ids=CASES)
def test_as_with_whole_sequences(attend, prompts, responses, padding):
    check(attend, prompts, responses, padding)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.lists(st.integers(0, 50), max_size=4)), min_size=1, max_size=4),
    st.integers(0, 2),
)
def test_any_lengths(views, padding):
    prompts, responses = [prompt for prompt, _ in views], [own for _, own in views]
    check(ours, prompts, responses, padding)
    check(by_two_calls, prompts, responses, padding)


def test_segments_of_about_one_length_share_a_call():
    segments = share_prompts([100, 110, 90, 400], [[30, 35], [33], [], [200]], row_length=1200, device=CPU)
    shapes = [(tuple(block.queries.shape), tuple(block.keys.shape)) for block in segments.blocks]
    assert shapes == [((3, 110), (3, 110)), ((1, 400), (1, 400)), ((3, 35), (3, 143)), ((1, 200), (1, 600))]
    assert [block.mask is None for block in segments.blocks] == [True, True, False, False]


def test_one_mask_serves_all_responses_to_prompts_of_one_length():
    (_, block) = share_prompts([50, 50], [[8, 8], [8]], row_length=124, device=CPU).blocks
    assert isinstance(block, AttentionBlock)
    assert tuple(block.mask.shape) == (1, 1, 8, 58)


def test_a_row_that_is_too_short_is_refused():
    with pytest.raises(AssertionError):
        share_prompts([5], [[2]], row_length=6, device=CPU)
