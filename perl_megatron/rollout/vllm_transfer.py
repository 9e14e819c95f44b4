"""The trainer's end of vLLM's weight transfer: NCCL on GPUs, gloo on CPUs, one connection for each server.

vLLM has one sender for one source of weights. Here one pass over the trainer's weights feeds the senders of all
servers, each in a thread of its own, so that a server that fails or hangs is left behind without the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine, WeightSource

from perl_megatron.checkpoint.weights import TensorInfo
from perl_megatron.rollout import vllm_gloo
from perl_megatron.rollout.hand_over import HandOver
from perl_megatron.rollout.server_client import ServerClient
from perl_megatron.runtime import platform
from perl_megatron.runtime.addresses import address_towards, free_port, host_of

vllm_gloo.register()


def transport_name() -> str:
    """vLLM's name of the transport that suits this device."""
    return "nccl" if platform.is_cuda() else vllm_gloo.BACKEND


class PassingWeights(WeightSource):
    """vLLM's source of weights: those that pass by in ``hand_over``.

    Args:
        tensors: name, shape and dtype of what will pass, in this order.
    """

    def __init__(self, tensors: Sequence[tuple[str, TensorInfo]]):
        self._metadata = [ParamMeta(name, info.dtype, tuple(info.shape)) for name, info in tensors]
        self.hand_over: HandOver[tuple[str, Tensor]] | None = None

    def metadata(self) -> list[ParamMeta]:
        """What iteration will yield."""
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        assert self.hand_over is not None, "an update has not begun"
        for expected, (name, tensor) in zip(self._metadata, self.hand_over, strict=True):
            assert (name, tuple(tensor.shape), tensor.dtype) == (expected.name, expected.shape, expected.dtype)
            yield name, tensor


class Transfer:
    """The connection to one server.

    Args:
        client: of the server.
        source: what will be sent, each time.
        num_workers: processes of the server.
        seconds: what joining, and on CPUs each tensor, may take.

    Raises:
        ServerFailure: the server did not join.
    """

    def __init__(self, client: ServerClient, source: PassingWeights, *, num_workers: int, seconds: float):
        self.source = source
        self._device = platform.device()
        address = address_towards(host_of(client.address))
        port, size = free_port(address), 1 + num_workers
        information: Any
        if self._device.type == "cuda":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            torch.cuda.set_device(self._device)  # this is a thread of its own
            information = NCCLTrainerInitInfo(address, port, size, rank=0)
        else:
            information = vllm_gloo.GlooTrainerInit(address, port, size, seconds, rank=0)
        self._engine: TrainerWeightTransferEngine[Any] = WeightTransferTrainerFactory.trainer_init(
            information, client=client, source=source
        )

    def send(self, weights: HandOver[tuple[str, Tensor]]) -> None:
        """Send what is handed over, and let the server load it."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self.source.hand_over = weights
        self._engine.send_weights()  # type: ignore[call-arg]

    def close(self) -> None:
        """Leave the group."""
        self._engine.shutdown()
