"""`transformer_engine.common`: the base class of a recipe that megatron-core wraps."""

from types import SimpleNamespace


class DelayedScaling:
    """A recipe."""


recipe = SimpleNamespace(DelayedScaling=DelayedScaling)
