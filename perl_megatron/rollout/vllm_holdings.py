"""Where vLLM's Qwen2.5-VL keeps each published weight on this rank, and how to read it (vLLM 0.32).

On a CPU, vLLM multiplies by repacked copies of its matrices and drops the originals. They are asked for their columns
by multiplying unit vectors: 1 · w plus zeros is w without rounding, so what comes back are the packed numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from perl_megatron.checkpoint.qwen25_vl_table import EMBEDDING, OUTPUT_LAYER
from perl_megatron.errors import UserError
from perl_megatron.rollout.attestation import Holding, Segment
from perl_megatron.rollout.digest import as_matrix

_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head", "lm_head"),
    ("visual.", "visual."),
)
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def holdings(model: nn.Module, *, tied: bool) -> list[Holding]:
    """Every parameter of this rank; ``tied``: the output layer is the embedding.

    Raises:
        UserError: the model has a parameter that is not understood, as a newer vLLM's may.
    """
    found = []
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            found += list(_of_module(name, module, tied=tied))
    return found


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors that are no weights: rotary angles."""
    return dict(model.named_buffers())


def renew_output_layer(model: nn.Module, *, tied: bool) -> None:
    """After an update, make a tied output layer follow the embedding that was reloaded.

    On a CPU vLLM multiplies by a repacked copy of each matrix. Its reload repacks the layers that got a weight; a tied
    output layer shares the embedding's weight and gets none of its own, so its copy stays that of the old policy
    (seen with vLLM 0.32: log-probabilities off by up to 0.2 nats after a few updates).
    """
    head = model.get_submodule("language_model.lm_head")
    if tied and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)  # type: ignore[union-attr,operator]


def _of_module(name: str, module: Any, *, tied: bool) -> Iterator[Holding]:
    from vllm.model_executor.layers.conv import Conv3dLayer
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    published = _published(name)
    if isinstance(module, LinearBase):
        yield from _of_linear(name, published, module)
    elif isinstance(module, VocabParallelEmbedding):
        indices = module.shard_indices
        first, count = indices.org_vocab_start_index, indices.org_vocab_end_index - indices.org_vocab_start_index
        is_output = isinstance(module, ParallelLMHead)
        tensor = EMBEDDING if is_output and tied else (OUTPUT_LAYER if is_output else EMBEDDING)
        segments = (Segment(tensor, first, 0, count),) if count else ()
        if is_output and hasattr(module, "cpu_linear"):
            read = _packed(module, module.embedding_dim)
            yield Holding(f"{name}.packed", segments, 0, module.embedding_dim, read, is_costly=True)
        yield _of_parameter(f"{name}.weight", module.weight, segments)
    elif isinstance(module, RMSNorm | Conv3dLayer):
        for kind, parameter in module.named_parameters(recurse=False):
            segments = (Segment(f"{published}.{kind}", 0, 0, len(parameter)),)
            yield _of_parameter(f"{name}.{kind}", parameter, segments)
    else:
        raise UserError(
            f"vLLM's {name} is a {type(module).__name__}, whose parameters cannot be compared with what was sent",
            where="rollout.attestation",
            fix="rollout.attestation=off, or another version of vLLM",
        )


def _of_linear(name: str, published: str, module: Any) -> Iterator[Holding]:
    first_column, num_columns = 0, module.input_size
    if hasattr(module, "input_size_per_partition"):
        num_columns = module.input_size_per_partition
        first_column = module.tp_rank * num_columns if num_columns != module.input_size else 0
    rows = _rows(published, module)
    weights = tuple(Segment(f"{tensor}.weight", *place) for tensor, *place in rows)
    if hasattr(module, "cpu_linear"):
        read = _packed(module, num_columns)
        yield Holding(f"{name}.weight", weights, first_column, num_columns, read, is_costly=True)
    else:
        yield _of_parameter(f"{name}.weight", module.weight, weights, first_column)
    if module.bias is not None:
        biases = tuple(Segment(f"{tensor}.bias", *place) for tensor, *place in rows)
        yield _of_parameter(f"{name}.bias", module.bias, biases)


def _rows(published: str, module: Any) -> list[tuple[str, int, int, int]]:
    """(published tensor without its kind, first row there, first row here, their number) of a layer's outputs."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

    stem, last = published.rsplit(".", 1)
    if isinstance(module, QKVParallelLinear):
        key_rank = module.tp_rank // module.num_kv_head_replicas
        ranks = (module.tp_rank, key_rank, key_rank)
        heads = (module.num_heads, module.num_kv_heads, module.num_kv_heads)
        total_heads = (module.total_num_heads, module.total_num_kv_heads, module.total_num_kv_heads)
        sizes = [number * module.head_size for number in heads]
        totals = [number * module.head_size for number in total_heads]
    elif isinstance(module, MergedColumnParallelLinear):
        totals = list(module.output_sizes)
        sizes = [total // module.tp_size for total in totals]
        ranks = (module.tp_rank,) * len(totals)
    elif isinstance(module, RowParallelLinear):
        return [(published, 0, 0, module.output_size)]
    else:
        count = getattr(module, "output_size_per_partition", module.output_size)
        return [(published, module.tp_rank * count if count != module.output_size else 0, 0, count)]
    parts = _FUSED.get(last)
    names = [f"{stem}.{part}" for part in parts] if parts else [published] * len(totals)
    found, held, stacked = [], 0, 0
    for tensor, rank, size, total in zip(names, ranks, sizes, totals, strict=True):
        # The vision tower's qkv is published stacked: one tensor, three parts.
        found.append((tensor, rank * size + (0 if parts else stacked), held, size))
        held, stacked = held + size, stacked + total
    return found


def _of_parameter(name: str, parameter: Tensor, segments: tuple[Segment, ...], first_column: int = 0) -> Holding:
    matrix = as_matrix(parameter.detach())
    # The parameter is read when it is asked for: an update writes into its memory, and may give it another.
    return Holding(name, segments, first_column, matrix.shape[1], lambda columns: _columns(parameter, columns))


def _columns(parameter: Tensor, columns: Tensor) -> Tensor:
    return as_matrix(parameter.detach()).index_select(1, columns.to(parameter.device))


def _packed(module: Any, num_columns: int) -> Callable[[Tensor], Tensor]:
    def read(columns: Tensor) -> Tensor:
        dtype = getattr(module, "params_dtype", module.weight.dtype)
        units = torch.zeros(len(columns), num_columns, dtype=dtype)
        units[torch.arange(len(columns)), columns] = 1
        result: Tensor = module.cpu_linear(units, module.weight, None)
        return result.t()

    return read


def _published(name: str) -> str:
    for ours, theirs in _PREFIXES:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise UserError(
        f"vLLM's module {name} has no published name",
        where="rollout.attestation",
        fix="rollout.attestation=off, or another version of vLLM",
    )
