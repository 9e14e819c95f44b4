import importlib.machinery
import importlib.util

import pytest
import torch

from perl_megatron.model import layer_specs


@pytest.mark.parametrize(
    ("dtype", "cuda", "installed", "expected"),
    [
        (torch.bfloat16, True, True, True),
        (torch.float32, True, True, False),  # its packed attention has no float32 kernel
        (torch.bfloat16, False, True, False),
        (torch.bfloat16, True, False, False),
    ],
)
def test_transformer_engines_layers_are_for_bfloat16_on_cuda(monkeypatch, dtype, cuda, installed, expected):
    spec = importlib.machinery.ModuleSpec("transformer_engine", None) if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(layer_specs.platform, "is_cuda", lambda: cuda)
    assert layer_specs.uses_transformer_engine(dtype) == expected
    if not expected:
        assert type(layer_specs.choose_provider(dtype)) is layer_specs.TorchSpecProvider
