"""The trainer's end of vLLM's weight transfer: NCCL on GPUs, gloo on CPUs, one connection for each server.

vLLM has one sender for one source of weights. Here one pass over the trainer's weights feeds the senders of all
servers, each in a thread of its own, so that a server that fails or hangs is left behind without the others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine, WeightSource

from perl_megatron.checkpoint.weights import TensorInfo
from perl_megatron.launch.ports import free_port
from perl_megatron.rollout import vllm_gloo
from perl_megatron.rollout.hand_over import HandOver
from perl_megatron.rollout.server_client import ServerClient, describe
from perl_megatron.runtime import platform
from perl_megatron.runtime.addresses import address_towards, host_of

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
            if tensor.is_cuda:
                # It was made on the main thread's stream, which may still be at it, and its memory must not be given
                # away there before this thread's stream has sent it.
                stream = torch.cuda.current_stream()
                stream.wait_stream(torch.cuda.default_stream(tensor.device))
                tensor.record_stream(stream)
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
        self._source, self._client = source, _ClientOfUpdate(client)
        self._device = platform.device()
        # A stream of its own: one server that takes nothing must not hold up what goes to another.
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        address = address_towards(host_of(client.address))
        size = 1 + num_workers
        information: Any
        if self._stream is not None:
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            # Not packed: that would share streams between servers, and hold gigabytes for each.
            information = NCCLTrainerInitInfo(address, free_port(address), size, packed=False, rank=0)
        else:
            information = vllm_gloo.GlooTrainerInit(address, size, seconds, rank=0)
        with self._on_device():
            self._engine: TrainerWeightTransferEngine[Any] = WeightTransferTrainerFactory.trainer_init(
                information, client=self._client, source=source
            )

    def send(self, weights: HandOver[tuple[str, Tensor]]) -> None:
        """Send what is handed over, and let the server load it."""
        self._source.hand_over = self._client.hand_over = weights
        with self._on_device():
            self._engine.send_weights()  # type: ignore[call-arg]

    def close(self) -> None:
        """Leave the group."""
        self._engine.shutdown()

    def _on_device(self) -> Any:
        """Both are a thread's own."""
        if self._stream is None:
            return nullcontext()
        torch.cuda.set_device(self._device)
        return torch.cuda.stream(self._stream)


class _ClientOfUpdate:
    """vLLM's view of a server during an update: a ``VLLMWeightSyncClient`` that ends when the update is given up."""

    def __init__(self, client: ServerClient):
        self._client = client
        self.hand_over: HandOver[tuple[str, Tensor]] | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let the workers join the trainer."""
        self._client.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        """Weights are about to come; not where they will not."""
        assert self.hand_over is not None
        self.hand_over.check()
        self._client.start_weight_update()
        self.hand_over.check()

    def update_weights(self, update_info: Any) -> None:
        """Let the workers receive. Returns when they have, or when the update is given up.

        A server that refuses gives the update up, with what it said: the sender would wait for it for long. In a
        thread that nobody waits for at exit, which vLLM's own would be.
        """
        hand_over, is_done = self.hand_over, threading.Event()
        assert hand_over is not None
        hand_over.check()

        def receive() -> None:
            try:
                self._client.update_weights(update_info)
            except Exception as error:
                hand_over.give_up(f"send the weights: {describe(error)}")
            is_done.set()

        threading.Thread(target=receive, name="a server receives weights", daemon=True).start()
        while not is_done.wait(0.02):
            hand_over.check()
        hand_over.check()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """All weights have come."""
        self._client.finish_weight_update(weight_version)
