"""What can go wrong in a weight update without an error, done to a running vLLM on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from perl_megatron.errors import UserError
from perl_megatron.rollout import vllm_holdings
from perl_megatron.rollout.attestation import TURNS
from perl_megatron.rollout.engine import Sampling
from perl_megatron.types import Rollout


def a_row_of_a_fused_shard(model: nn.Module) -> None:
    """In the copy that the kernel multiplies by: a row of layer 1's key projection."""
    repack(model, "language_model.model.layers.1.self_attn.qkv_proj", "k_proj")


def a_shard_of_the_vision_tower(model: nn.Module) -> None:
    """A row of the values of block 0, which are published stacked with queries and keys."""
    repack(model, "visual.blocks.0.attn.qkv", None)


def a_bias_of_the_merger(model: nn.Module) -> None:
    """One number of it."""
    model.get_parameter("visual.merger.mlp.0.bias").data[3] += 1


def a_single_number(model: nn.Module) -> None:
    """Of layer 0's output projection: seen when all numbers are compared."""
    repack(model, "language_model.model.layers.0.self_attn.o_proj", None, column=-1)


def rotary_angles(model: nn.Module) -> None:
    """A buffer, as is lost when an engine sleeps too deeply."""
    name = next(name for name in vllm_holdings.buffers(model) if "cos_sin" in name)
    model.get_buffer(name).zero_()


def repack(model: nn.Module, name: str, part: str | None, column: int | slice = slice(None)) -> None:
    """Change a row of a linear layer, or one number of it, by its own loading."""
    module: Any = model.get_submodule(name)
    (holding,) = (each for each in vllm_holdings.holdings(model, tied=True) if each.name == f"{name}.weight")
    weight = holding.read(torch.arange(holding.num_columns)).contiguous()
    (segment,) = [each for each in holding.segments if part is None or part in each.published][-1:]
    weight[segment.first_held_row + segment.num_rows - 1, column] *= 2
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.quant_method.process_weights_after_loading(module)


CORRUPTIONS: dict[str, Callable[[nn.Module], None]] = {
    each.__name__: each
    for each in (a_row_of_a_fused_shard, a_shard_of_the_vision_tower, a_bias_of_the_merger, rotary_angles)
}
NOTHING, STALE_OUTPUT, ONE_NUMBER = "nothing", "an output layer that stays old", "a single number"
renew_output_layer = vllm_holdings.renew_output_layer


class Corruptor:
    """Corrupts the model of this process in every update, after the reload and before it is attested.

    Args:
        corrupts: whether this process is to be corrupted; the others go on as ever, but for ``STALE_OUTPUT``.
    """

    def __init__(self, model: nn.Module, *, corrupts: bool):
        self._model, self.corrupts = model, corrupts
        self._buffers = {name: buffer.clone() for name, buffer in vllm_holdings.buffers(model).items()}

    def switch(self, kind: str) -> None:
        """From now on this kind; what an earlier one did to buffers, which no update mends, is undone."""
        for name, buffer in vllm_holdings.buffers(self._model).items():
            buffer.copy_(self._buffers[name])

        def action(model: nn.Module, *, tied: bool) -> None:
            if kind != STALE_OUTPUT:
                renew_output_layer(model, tied=tied)
            if self.corrupts and kind not in (NOTHING, STALE_OUTPUT):
                (CORRUPTIONS | {ONE_NUMBER: a_single_number})[kind](model)

        vllm_holdings.renew_output_layer = action


Stream = Callable[[], Iterator[tuple[str, torch.Tensor]]]


def complaints(
    engine: Any, stream: Stream, other: Stream, switch: Callable[[str], None], attest: Callable[[str], None]
) -> dict[str, str]:
    """What the engine says to each corruption; '' if nothing.

    ``stream`` and ``other`` bring different weights; in the end the engine has those of ``stream``. ``switch`` is that
    of the ``Corruptor`` of every process that holds weights, ``attest`` sets `rollout.attestation`.
    """
    found = {}
    for kind in CORRUPTIONS:
        switch(kind)
        found[kind] = complaint(engine, stream)
    switch(NOTHING)
    assert complaint(engine, other) == ""
    switch(STALE_OUTPUT)
    found[STALE_OUTPUT] = complaint(engine, stream)
    attest("full")
    switch(ONE_NUMBER)
    found[ONE_NUMBER] = complaint(engine, stream)
    switch(NOTHING)
    found[NOTHING] = complaint(engine, stream)
    attest("sample")
    found[NOTHING] += complaint(engine, stream)
    return found


def complaint(engine: Any, stream: Stream) -> str:
    """The message with which one of some updates ends; '' if all succeed. Packed parameters take turns."""
    for version in range(50, 50 + TURNS):
        try:
            engine.update_weights(stream(), version=version)
        except UserError as error:
            return str(error)
    return ""


def with_stale_features(
    engine: Any, stream: Stream, run: Callable[[Sampling], Sequence[Rollout]], sampling: Sampling
) -> Sequence[Rollout] | str:
    """What is sampled after an update where nobody forgets what was cached, or the error of a vLLM that gives up."""
    run(sampling)  # fills the caches
    engine._drop_caches = lambda: None
    try:
        engine.update_weights(stream(), version=60)
        return run(sampling)
    except (RuntimeError, AssertionError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        del engine._drop_caches
