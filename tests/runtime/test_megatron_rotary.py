"""Shim S10 against megatron-core's own function; it should go once that is as fast."""

import inspect

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shims are for machines without CUDA")


def upstream(t, angles):
    """megatron-core's formula."""
    return t * angles.cos() + rope_utils._rotate_half(t, False) * angles.sin()


def test_megatron_core_still_needs_the_shim():
    with open(inspect.getsourcefile(rope_utils)) as source:
        text = source.read()
    assert "cos_ = (torch.cos(freqs) * mscale).to(t.dtype)" in text
    assert "return torch.cat((t, t_pass), dim=-1)" in text


@pytest.mark.parametrize("rows", [1, 2], ids=["one for all rows", "per row"])
def test_values_and_gradients_are_upstreams(rows):
    angles = torch.randn(5, rows, 1, 8, dtype=torch.float64)
    ours, theirs = (torch.arange(240.0, dtype=torch.float64).view(5, 2, 3, 8).requires_grad_() for _ in range(2))
    gradient = torch.randn(5, 2, 3, 8, dtype=torch.float64)
    found, expected = rope_utils._apply_rotary_pos_emb_bshd(ours, angles), upstream(theirs, angles)
    found.backward(gradient)
    expected.backward(gradient)
    exact = {"rtol": 1e-14, "atol": 1e-13}
    torch.testing.assert_close(found, expected, **exact)
    torch.testing.assert_close(ours.grad, theirs.grad, **exact)


def test_other_angles_dtypes_and_changed_angles_are_not_mistaken_for_the_last():
    t = torch.randn(4, 1, 2, 6, dtype=torch.float64)
    angles = torch.randn(4, 1, 1, 6, dtype=torch.float64)
    for change in (lambda: angles, lambda: angles.clone().neg_(), lambda: angles.mul_(2)):
        now = change()
        found = rope_utils._apply_rotary_pos_emb_bshd(t, now)
        torch.testing.assert_close(found, upstream(t, now), rtol=1e-14, atol=1e-13)
    assert rope_utils._apply_rotary_pos_emb_bshd(t.bfloat16(), angles).dtype == torch.bfloat16


def test_inference_mode_leaves_nothing_behind():
    """Its tensors have no version, and cannot be kept for a backward pass."""
    t, angles = torch.randn(4, 1, 2, 6), torch.randn(4, 1, 1, 6)
    with torch.inference_mode():
        of_inference = torch.randn(4, 1, 1, 6)
        for now in (angles, of_inference, of_inference):
            rope_utils._apply_rotary_pos_emb_bshd(t, now)
    trained = t.clone().requires_grad_()
    rope_utils._apply_rotary_pos_emb_bshd(trained, angles).sum().backward()
    assert trained.grad.any()


def test_angles_may_be_learned():
    t, angles = torch.randn(4, 1, 2, 6), torch.randn(4, 1, 1, 6).requires_grad_()
    rope_utils._apply_rotary_pos_emb_bshd(t, angles).square()[..., 0].sum().backward()
    assert angles.grad.any()


def test_a_part_without_angles_is_left_to_upstream():
    t, angles = torch.randn(4, 1, 2, 10), torch.randn(4, 1, 1, 6)
    found = rope_utils._apply_rotary_pos_emb_bshd(t, angles)
    torch.testing.assert_close(found[..., :6], upstream(t[..., :6], angles))
    assert torch.equal(found[..., 6:], t[..., 6:])
