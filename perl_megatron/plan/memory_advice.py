"""Remarks on the memory of a plan, the trainer's and the engine's, with what would take less. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.config.derive import Derived
from perl_megatron.config.schema import Config
from perl_megatron.plan.engine import EngineMemory
from perl_megatron.plan.gpus import GIB, Gpu
from perl_megatron.plan.memory import StageMemory
from perl_megatron.plan.remark import Remark, name_ranks
from perl_megatron.plan.workload import Workload

FULL = 0.9
"""Share of a device above which a plan is called tight."""


@dataclass(frozen=True)
class MemoryAdvice:
    """On a plan for devices of ``device_bytes``."""

    config: Config
    derived: Derived
    numbers: ArchitectureNumbers
    gpu: Gpu
    device_bytes: float
    stages: Sequence[StageMemory]
    workload: Workload
    engine: EngineMemory
    host_bytes: float
    """Of the machine's memory for each device; on a CPU that is the device's."""

    def on_training(self, *, without_full_recomputation: float) -> Iterator[Remark]:
        """``without_full_recomputation``: the peak in bytes with `model.recompute=selective`."""
        config, device_bytes = self.config, self.device_bytes
        worst = max(self.stages, key=lambda stage: stage.peak)
        they_need = self._they_need(worst)
        phase = worst.fullest_phase
        if worst.peak > device_bytes:
            text = f"{they_need} {worst.peak / GIB:.1f} GiB ({phase}), and a device has {device_bytes / GIB:.1f} GiB"
            yield Remark("does not fit", "cannot run", text, "; ".join(self._ways_to_less(worst)))
        elif worst.peak > FULL * device_bytes:
            share = worst.peak / device_bytes
            yield Remark(
                "tight",
                "note",
                f"{they_need} {share:.0%} of a device ({phase}): the assumptions below decide whether it fits",
                "; ".join(self._ways_to_less(worst)[:2]),
            )
        elif config.model.recompute == "full" and without_full_recomputation < FULL * device_bytes:
            yield Remark(
                "recomputes with memory left",
                "wasteful",
                "a third more arithmetic in the language model's updates, while with selective recomputation "
                f"{without_full_recomputation / device_bytes:.0%} of the fullest device would be taken",
                "model.recompute=selective",
            )

    def on_host(self) -> Iterator[Remark]:
        """Whether what lies beside the device has room; on a CPU it lies on the device."""

        def taken(stage: StageMemory) -> float:
            return stage.host.peak + (stage.peak if self.gpu.is_cpu else 0.0)

        worst = max(self.stages, key=taken)
        if taken(worst) <= self.host_bytes or worst.peak > self.device_bytes:  # the latter is said already
            return
        fixes = [self._wider()]
        if self.config.algorithm.kl_coefficient > 0:
            fixes.append("algorithm.kl_coefficient=0")
        if worst.host.engine:
            fixes.append("rollout.sleep_mode=false")
        fixes.append("--memory-gib" if self.gpu.is_cpu else "--assume host_gib=GIB where machines have more")
        yield Remark(
            "host memory",
            "cannot run",
            f"{self._they_need(worst)} {taken(worst) / GIB:.1f} GiB of the machine's memory (for the reference policy, "
            f"a sleeping engine, checkpoints), and each has {self.host_bytes / GIB:.1f} GiB",
            "; ".join(filter(None, fixes)),
        )

    def _they_need(self, stage: StageMemory) -> str:
        """The beginning of what is said of a stage's ranks."""
        ranks = self.derived.world_size // self.derived.pipeline_size
        need = "needs" if ranks == 1 else "need"
        return f"{name_ranks(stage.stage * ranks, ranks)} (pipeline stage {stage.stage}) {need}"

    def _wider(self) -> str:
        """What spreads parameters, gradients and optimizer further; '' where nothing does."""
        derived, numbers = self.derived, self.numbers
        parts = (numbers.num_heads, numbers.num_kv_heads, numbers.ffn_size)  # a tower that does not divide can be whole
        sizes = range(derived.tensor_size + 1, self.gpu.per_node + 1)
        ways = []
        if any(all(part % size == 0 for part in parts) for size in sizes):
            ways.append("a larger parallel.tensor")
        if derived.pipeline_size < numbers.num_layers:
            ways.append("a larger parallel.pipeline")
        if self.config.optimizer.distributed:
            ways.append("more processes")
        return " or ".join(ways)

    def _ways_to_less(self, worst: StageMemory) -> list[str]:
        """What to change in the fullest phase, by what takes most."""
        config, derived, gpu = self.config, self.derived, self.gpu
        wider = self._wider()
        ways = [(float(worst.exact), wider)] if wider else []
        if not config.optimizer.distributed and derived.data_size > 1:
            ways.append((worst.static.optimizer, "optimizer.distributed=true"))
        phase = worst.fullest_phase
        if phase == "update":
            active = worst.activations + worst.vision_activations + worst.work
            if config.model.recompute != "full":
                ways.append((active, "model.recompute=full"))
            elif config.actor.micro_batch_tokens > derived.max_sequence_tokens:
                # Below the largest view's memory, views are split and computed more than once.
                whole = self.workload.largest_view_memory
                least = whole if config.actor.micro_batch_tokens > whole else max(derived.max_sequence_tokens, 1)
                ways.append((active, f"actor.micro_batch_tokens={least}"))
            else:
                ways.append((active, "shorter data.max_prompt_tokens or rollout.max_response_tokens"))
            if not config.parallel.sequence and derived.tensor_size > 1:
                ways.append((active / 2, "parallel.sequence=true"))
        elif phase == "weight sync" and worst.synchronization > worst.least_synchronization:
            ways.append((worst.synchronization, "a smaller rollout.sync_bucket_mib"))
        engine = worst.engine
        own = {"update": engine.update, "weight sync": engine.sync, "generate": engine.generate}[phase]
        if own and not gpu.is_cpu and not config.rollout.sleep_mode:  # on a CPU none sleeps
            ways.append((own, "rollout.sleep_mode=true"))
        if own == engine.generate > 0 and derived.engine == "vllm":
            key = self._engine_size
            size = getattr(config.rollout, key)
            of_cache = size * GIB if gpu.is_cpu else own  # where what comes beside the cache is not cut
            ways.append((of_cache, f"rollout.{key} below {size:g}"))
            if gpu.is_cpu and self._engine_can_be_wider:
                ways.append((own - of_cache, "a larger rollout.tensor_parallel"))
        if own and derived.engine == "embedded":
            ways.append((own, "rollout.engine=vllm, which is spread over processes"))
        return [text for _, text in sorted(ways, reverse=True)]

    @property
    def _engine_can_be_wider(self) -> bool:
        derived, numbers = self.derived, self.numbers
        parts = (derived.world_size, numbers.num_heads, numbers.num_kv_heads)
        sizes = range(derived.engine_tensor_size + 1, derived.world_size + 1)
        return any(all(part % size == 0 for part in parts) for size in sizes)

    @property
    def _engine_size(self) -> str:
        """The field of the rollouts that says how much vLLM takes on this device."""
        return "cpu_cache_gib" if self.gpu.is_cpu else "gpu_memory_fraction"

    def on_engine(self) -> Iterator[Remark]:
        """Whether it has enough, and is the right one."""
        derived, engine, rollout = self.derived, self.engine, self.config.rollout
        larger = f"a larger rollout.{self._engine_size} or rollout.tensor_parallel"
        if derived.engine == "embedded":
            if derived.world_size > 1 or self._is_large:
                yield Remark(
                    "slow engine",
                    "wasteful",
                    "the embedded engine is a whole model in every process, and made for tests and small policies",
                    "install vLLM and set rollout.engine=vllm, or ask servers",
                )
            return
        if engine.cache <= 0 or not engine.longest_fits:
            weights, rest = engine.weights / GIB, (engine.multimodal + engine.step + engine.fixed) / GIB
            yield Remark(
                "engine does not fit",
                "cannot run",
                f"of vLLM's {engine.reserve / GIB:.1f} GiB, weights take {weights:.1f} and one step with its images "
                f"{rest:.1f}: what is left holds no sequence of {derived.max_sequence_tokens} tokens",
                f"{larger}, or fewer data.max_prompt_tokens",
            )
        elif engine.concurrent_sequences < rollout.max_concurrent_sequences:
            yield Remark(
                "engine runs few sequences",
                "wasteful",
                f"vLLM's cache holds about {engine.concurrent_sequences} sequences of mean length, not the "
                f"{rollout.max_concurrent_sequences} of rollout.max_concurrent_sequences",
                larger,
            )
        if derived.engine == "vllm" and not rollout.sleep_mode and not self.gpu.is_cpu:
            yield Remark(
                "engine stays awake",
                "note",
                f"vLLM keeps its {engine.reserve / GIB:.1f} GiB during updates",
                "rollout.sleep_mode=true copies its weights to host memory and back in every step",
            )

    @property
    def _is_large(self) -> bool:
        """Whether the embedded engine's model is one that vLLM should run."""
        return self.engine.weights > GIB
