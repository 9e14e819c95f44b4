"""Weight transfer over gloo, for vLLM's weight-transfer interface, which has no transport for CPUs of its own.

Both ends: the worker's engine in a server, and the trainer's engine in rank 0. A group is the trainer as rank 0 and the
workers of one server. On a GPU vLLM's own NCCL transport is used instead (``vllm_transfer``).
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from perl_megatron.launch.ports import family_of
from perl_megatron.runtime.addresses import address_towards

BACKEND = "perl_megatron_gloo"
"""The transport's name in vLLM's `--weight-transfer-config`."""


@dataclass
class GlooInit(WeightTransferInitInfo):
    """Where the workers of a server meet the trainer."""

    address: str
    port: int
    world_size: int
    seconds: float
    """What joining, and each tensor, may take."""


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):
    """What will be sent, in this order."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


@dataclass
class GlooTrainerInit(TrainerInitInfo):
    """The same for the trainer's end, which opens a free port of ``address``."""

    backend: ClassVar[str] = BACKEND

    address: str
    world_size: int
    seconds: float


class GlooWorkerEngine(WeightTransferEngine[GlooInit, GlooUpdate]):
    """A worker's end."""

    init_info_cls = GlooInit
    update_info_cls = GlooUpdate
    _group: _Group | None = None

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        """Join the trainer; a group that is there already is left."""
        self.shutdown()
        layout = self.parallel_config
        rank = 1 + layout.data_parallel_index * layout.world_size + layout.rank
        self._group = _Group(init_info.address, init_info.port, rank, init_info.world_size, init_info.seconds)

    def start_weight_update(self) -> None:
        """Layers are loaded, and repacked, one after another."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """All layers are loaded."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As upstream's, which waits for an accelerator that a CPU does not have."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdate) -> None:
        """Receive the announced tensors and load each as it comes."""
        self.model.load_weights(self._received(update_info))

    def _received(self, update_info: GlooUpdate) -> Iterator[tuple[str, Tensor]]:
        assert self._group is not None, "init_transfer_engine comes first"
        for name, dtype, shape in zip(update_info.names, update_info.dtypes, update_info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self._group.broadcast(tensor)
            yield name, tensor

    def shutdown(self) -> None:
        """Leave the group."""
        self._group = None


class GlooTrainerEngine(TrainerWeightTransferEngine[GlooTrainerInit]):
    """The trainer's end: one for each server."""

    init_info_cls = GlooTrainerInit
    _group: _Group | None = None

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInit, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> GlooTrainerEngine:
        """Open the port and let the workers join."""
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        address, size, seconds = init_info.address, init_info.world_size, init_info.seconds
        # Bound here, so that it listens on this address alone, and the port is nobody else's meanwhile.
        listener = socket.create_server((address, 0), family=family_of(address))
        port = listener.getsockname()[1]
        joining = asdict(GlooInit(address, port, size, seconds))
        with _in_background(client.init_weight_transfer_engine, joining):
            engine._group = _Group(address, port, 0, size, seconds, listener=listener)
        return engine

    def send_weights(self) -> None:
        """Send the source once: begin, tensor by tensor while the workers load them, finish."""
        assert self.source is not None
        assert self._group is not None
        metadata = self.source.metadata()
        update = GlooUpdate(
            [each.name for each in metadata],
            [str(each.dtype).removeprefix("torch.") for each in metadata],
            [list(each.shape) for each in metadata],
        )
        self.client.start_weight_update()
        with _in_background(self.client.update_weights, asdict(update)):
            for _, tensor in self.source:
                self._group.broadcast(tensor.detach().contiguous())
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        """Leave the group."""
        self._group = None


class _Group:
    """A gloo group beside torch's default one."""

    def __init__(
        self,
        address: str,
        port: int,
        rank: int,
        world_size: int,
        seconds: float,
        *,
        listener: socket.socket | None = None,
    ):
        limit = timedelta(seconds=seconds)
        self._store = dist.TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0,
            timeout=limit,
            wait_for_workers=False,
            master_listen_fd=None if listener is None else listener.detach(),
        )
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        # The interface on which the other end is, not the one that this machine's name resolves to.
        own_address = address if rank == 0 else address_towards(address)
        options._devices = [gloo.create_device(hostname=own_address)]
        options._timeout = limit
        self._group = gloo(self._store, rank, world_size, options)

    def broadcast(self, tensor: Tensor) -> None:
        """From rank 0, into ``tensor`` elsewhere. Bytes, so that every dtype goes the same way."""
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self._group.broadcast([tensor.view(-1).view(torch.uint8)], options).wait()


class _in_background:
    """``with _in_background(function, argument)``: it runs beside the block; the block's error comes first.

    If the block fails, the call is not waited for, nor at exit: the other end may wait for what will not come.
    """

    def __init__(self, function: Callable[[Any], None], argument: Any):
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(function, argument), daemon=True)

    def _run(self, function: Callable[[Any], None], argument: Any) -> None:
        try:
            function(argument)
        except Exception as error:
            self._error = error

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self._thread.join()
            if self._error is not None:
                raise self._error


def register() -> None:
    """Make the transport known to vLLM in this process; a second call does nothing."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, GlooWorkerEngine)
        WeightTransferTrainerFactory.register_engine(BACKEND, GlooTrainerEngine)
