"""What a rank sends in a step of training, by what for, and over which links. No torch.

B tokens of a micro-batch on the rank, e bytes of a number, H hidden size, D width of the vision tower, t, P, V, c, d:
tensor, pipeline, virtual, context and data-parallel sizes; N the rank's trained numbers. Collectives are counted as
rings send them: an all-gather or reduce-scatter of S bytes over n ranks sends (n - 1)/n · S, an all-reduce double.

- tensor: each layer an all-reduce (with sequence parallelism a reduce-scatter and an all-gather) of B·H·e after the
  attention and after the feed-forward part, the same backwards; with full recomputation forwards twice. With sequence
  parallelism the inputs of two products are gathered once more backwards. The tower likewise, where it is sharded; a
  frozen one forwards only. A replicated one gathers the features, as many rows from each rank as the one with most
  images has, and once an update adds up its gradients.
- pipeline: B·H·e forwards and as much backwards, once for each model chunk; a t-th of it with sequence parallelism.
- context: keys and values of each layer are gathered, and their gradients scattered.
- data: for each update, gradients in float32 (reduce-scatter, without distributed optimizer all-reduce) and parameters
  (all-gather).
- weight sync: all weights of the replica reach each of its ranks; and from one rank all servers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.config.derive import Derived
from perl_megatron.config.schema import Config
from perl_megatron.plan.activations import SINGLE, bytes_of_number
from perl_megatron.plan.assumptions import Assumptions
from perl_megatron.plan.gpus import Gpu
from perl_megatron.plan.parameters import count, stage_parameters, total_count, trained_parts


@dataclass(frozen=True)
class Traffic:
    """One kind of communication of a rank, in a step."""

    name: str
    bytes_sent: float
    within_node: bool
    """Whether all ranks of the group are in one node."""
    seconds: float
    """At the share of the link's bandwidth that is assumed; nothing of it is taken to be hidden."""

    def as_json(self) -> dict[str, Any]:
        """All numbers."""
        return asdict(self)


@dataclass(frozen=True)
class PassTraffic:
    """Bytes that a rank of a stage sends for one micro-batch, of one pass."""

    tensor: float
    pipeline: float
    context: float


class Links:
    """Which groups stay within a node, and how fast each kind of link is."""

    def __init__(self, derived: Derived, gpu: Gpu, assumptions: Assumptions):
        inner = derived.tensor_size * derived.context_size
        spans = {
            "tensor": derived.tensor_size,
            "context": inner,
            "data": inner * derived.data_size,
            "pipeline": derived.world_size,
        }
        self._within = {axis: gpu.within_node(span, derived.world_size) for axis, span in spans.items()}
        self._link = gpu.link * assumptions.link_efficiency
        self._network = gpu.network * assumptions.network_efficiency

    def within_node(self, axis: str) -> bool:
        """Whether the axis's groups do not leave a node; ranks lie tensor-fastest, then context, data, pipeline."""
        return self._within[axis]

    def seconds(self, axis: str, num_bytes: float) -> float:
        """To send so much along an axis."""
        return num_bytes / (self._link if self._within[axis] else self._network)

    def network_seconds(self, num_bytes: float) -> float:
        """To send so much to other nodes."""
        return num_bytes / self._network


def pass_traffic(
    config: Config,
    derived: Derived,
    numbers: ArchitectureNumbers,
    stage: int,
    *,
    tokens: float,
    patches: float,
    share: float,
    backward: bool,
) -> PassTraffic:
    """Of a micro-batch of ``tokens`` (of all context ranks) and ``patches``: forwards, or forwards and backwards.

    ``share``: of the patches, where whole images are dealt, that of the rank with most.
    """
    parallel, wide = config.parallel, bytes_of_number(config)
    tensor, context, layers = derived.tensor_size, derived.context_size, derived.stage_layers[stage]
    hidden = wide * tokens / context * numbers.hidden_size
    again = backward and config.model.recompute == "full"
    passes = 1 + backward + again
    ring = (tensor - 1) / tensor
    of_layers = layers * 2 * passes * 2 * ring * hidden
    if parallel.sequence and backward:
        of_layers += layers * 2 * ring * hidden
    of_tower = 0.0
    if stage == 0 and parallel.vision == "sharded":
        of_passes = passes if "vision" in trained_parts(config.optimizer) else 1
        of_tower = numbers.vision_depth * 2 * of_passes * 2 * ring * wide * patches * numbers.vision_hidden_size
    elif stage == 0:
        rows = share * patches / numbers.vision_merge_size**2
        of_tower = (tensor - 1) * rows * wide * numbers.vision_out_hidden_size
    is_end = stage == derived.pipeline_size - 1
    boundaries = derived.virtual_pipeline_size - (1 if is_end else 0)
    sent = boundaries + (backward * (derived.virtual_pipeline_size - (1 if stage == 0 else 0)))
    between = sent * hidden / (tensor if parallel.sequence else 1) if derived.pipeline_size > 1 else 0.0
    keys = 2 * wide * tokens * numbers.num_kv_heads * numbers.head_dim / tensor
    of_context = layers * (passes + backward) * (context - 1) / context * keys
    return PassTraffic(of_layers + of_tower, between, of_context)


def update_traffic(config: Config, derived: Derived, numbers: ArchitectureNumbers, stage: int) -> float:
    """Bytes that a rank of a stage sends along the data axis in one update."""
    ranks = derived.data_size * derived.context_size
    trained = count(stage_parameters(numbers, config.parallel, stage), trained_parts(config.optimizer))
    gathered = bytes_of_number(config) if config.optimizer.distributed else SINGLE
    return (ranks - 1) / ranks * trained * (SINGLE + gathered)


def model_parallel_gradients(
    config: Config, derived: Derived, numbers: ArchitectureNumbers, stage: int
) -> dict[str, float]:
    """Axis → bytes of gradients that a rank adds up along it in one update.

    A replicated tower's over the tensor-parallel ranks, a tied embedding's between the first stage and the last.
    """
    own, trained = stage_parameters(numbers, config.parallel, stage), trained_parts(config.optimizer)
    tower = sum(one.count for one in own if one.part != "language" and one.part in trained)
    tensor = derived.tensor_size
    is_replicated = config.parallel.vision == "replicated"
    shared = sum(one.count for one in own if one.is_shared_embedding and one.part in trained)
    return {
        "tensor": 2 * (tensor - 1) / tensor * SINGLE * tower if is_replicated else 0.0,
        "pipeline": float(SINGLE * shared),
    }


def sync_seconds(
    config: Config, derived: Derived, numbers: ArchitectureNumbers, links: Links, assumptions: Assumptions
) -> tuple[float, float]:
    """(bytes of the model, seconds until an engine has it) of one weight sync."""
    model = bytes_of_number(config) * total_count(numbers)
    # Gathered over tensor ranks and sent to all stages, overlapped: the slower of the two.
    gathered = links.seconds("tensor", model * (derived.tensor_size - 1) / derived.tensor_size)
    sent = links.seconds("pipeline", model * (derived.pipeline_size - 1) / derived.pipeline_size)
    seconds = max(gathered, sent)
    if derived.engine == "server":
        to_disk = config.rollout.weight_transfer == "disk"
        seconds += 2 * model / (assumptions.disk_gb * 1e9) if to_disk else links.network_seconds(model)
    return model, seconds
