"""Run by torchrun: the policy's weights as a stream, in buckets. `export_worker.py POLICY OUT`

Writes {bucket size: [whether all tensors are the checkpoint's, bytes in memory at the peak, tensors used while others
were on their way, collectives left]} of the worst rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from live_memory import LiveMemory

from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.checkpoint.stream import export_weights, import_weights
from perl_megatron.config.schema import ModelConfig, ParallelConfig
from perl_megatron.model.architecture import read_architecture
from perl_megatron.model.policy import build_policy
from perl_megatron.runtime import collective, platform, topology

BUCKETS = (200_000, 4_000_000, 1 << 30)
LAYOUT = ParallelConfig(tensor=2, pipeline=2)


class InFlight:
    """Counts collectives that were started and not yet waited for."""

    def __init__(self) -> None:
        self.now = self.most = 0
        for name in ("all_gather_into_tensor", "broadcast"):
            setattr(dist, name, self._watched(getattr(dist, name)))

    def _watched(self, start: Any) -> Any:
        def started(*arguments: Any, **options: Any) -> Any:
            work = start(*arguments, **options)
            if options.get("async_op"):
                self.now += 1
                self.most = max(self.most, self.now)
                return _Counted(work, self)
            return work

        return started


class _Counted:
    def __init__(self, work: Any, counter: InFlight):
        self._work, self._counter = work, counter

    def wait(self) -> None:
        self._work.wait()
        self._counter.now -= 1


def main(policy: Path, out: Path) -> None:
    platform.install()
    layout = topology.initialize(LAYOUT, seed=0, timeout_seconds=120)
    architecture, checkpoint = read_architecture(policy), dict(open_checkpoint(policy))
    chunks = build_policy(architecture, ModelConfig(path=policy, dtype="float32"), LAYOUT, layout)
    import_weights(chunks, architecture, layout, checkpoint)
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    in_flight, found = InFlight(), {}
    for bucket in BUCKETS:
        in_flight.most, equal, names, used_while_in_flight = 0, True, set(), 0
        with LiveMemory(besides=[*parameters, *checkpoint.values()]) as memory:
            for name, tensor in export_weights(chunks, architecture, layout, bucket_bytes=bucket, copies=False):
                used_while_in_flight += in_flight.now > 0
                names.add(name)
                equal = equal and bool((tensor == checkpoint[name]).all())
        found[bucket] = [equal and names == set(checkpoint), memory.peak, used_while_in_flight, in_flight.now]
    ranks = collective.gather_objects(found)
    if collective.rank() == 0:
        worst = {
            bucket: [all(r[bucket][0] for r in ranks), *(pick(r[bucket][i] for r in ranks) for i, pick in PICKS)]
            for bucket in BUCKETS
        }
        out.write_text(json.dumps(worst))
    topology.shutdown()


PICKS = ((1, max), (2, min), (3, max))

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
