"""What can go wrong in a weight update without an error, done to a running vLLM on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from perl_megatron.errors import UserError
from perl_megatron.rollout import vllm_colocated, vllm_holdings
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
    vllm_colocated_repack(model)
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


vllm_colocated_repack = vllm_colocated._repack_output_layer
CORRUPTIONS: dict[str, Callable[[nn.Module], None]] = {
    each.__name__: each
    for each in (a_row_of_a_fused_shard, a_shard_of_the_vision_tower, a_bias_of_the_merger, rotary_angles)
}


@contextmanager
def instead_of_the_repacked_output_layer(action: Callable[[nn.Module], None]) -> Iterator[None]:
    """Within an update, after the reload and before it is attested."""
    original = vllm_colocated._repack_output_layer
    vllm_colocated._repack_output_layer = action
    try:
        yield
    finally:
        vllm_colocated._repack_output_layer = original


Stream = Callable[[], Iterator[tuple[str, torch.Tensor]]]


def complaints(engine: Any, stream: Stream, other: Stream, *, corrupts: bool) -> dict[str, str]:
    """What the engine says to each corruption, of this rank's part if ``corrupts``; '' if nothing.

    ``stream`` and ``other`` bring different weights; in the end the engine has those of ``stream``.
    """
    found = {}
    repack_output_layer = vllm_colocated._repack_output_layer
    for name, corrupt in CORRUPTIONS.items():

        def action(model: nn.Module, corrupt: Callable[[nn.Module], None] = corrupt) -> None:
            repack_output_layer(model)
            if corrupts:
                corrupt(model)

        buffers = [buffer.clone() for buffer in _buffers(engine).values()]
        with instead_of_the_repacked_output_layer(action):
            found[name] = complaint(engine, stream)
        for buffer, before in zip(_buffers(engine).values(), buffers, strict=True):
            buffer.copy_(before)
    assert complaint(engine, other) == ""
    with instead_of_the_repacked_output_layer(lambda model: None):
        found["an output layer that stays old"] = complaint(engine, stream)
    engine._attestation = "full"
    with instead_of_the_repacked_output_layer(a_single_number if corrupts else repack_output_layer):
        found["a single number"] = complaint(engine, stream)
    found["nothing"] = complaint(engine, stream)
    engine._attestation = "sample"
    found["nothing"] += complaint(engine, stream)
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


def _buffers(engine: Any) -> dict[str, torch.Tensor]:
    return vllm_holdings.buffers(engine._llm.apply_model(lambda model: model)[0])
