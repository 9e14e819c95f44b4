"""Two ranks whose trainer and whose rollouts beside it both agree all the time; servers lose their weights once."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from perl_megatron.ahead import AheadCollector
from perl_megatron.data.wait_clock import DataWaits
from perl_megatron.drawn import Drawn
from perl_megatron.runtime import collective

STEPS, ROUNDS = 3, 20


class Engine:
    """Its own ``bring_again`` must come in the main thread: the weights are drawn there."""

    def __init__(self) -> None:
        self.num_brought = 0

    def bring_again(self) -> None:
        assert threading.current_thread() is threading.main_thread(), "the thread brought weights by itself"
        self.num_brought += 1
        agree("export again", self.num_brought)


class Collector:
    """Each step's groups are what all ranks said in each round of sampling."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self, step: int, alpha: float) -> Any:
        said = []
        for number in range(ROUNDS):
            if step == 1 and number == ROUNDS // 2:
                self._engine.bring_again()
            said.append(collective.gather_objects((f"rollouts of step {step}", number, collective.rank())))
        return Drawn(step, said)

    def take_waits(self) -> DataWaits:
        return DataWaits()

    def state(self) -> Any:
        return dict

    def close(self) -> None:
        pass


def agree(what: str, number: int) -> None:
    """As the trainer's own collectives."""
    expected = [(what, number, rank) for rank in (0, 1)]
    assert collective.gather_objects((what, number, collective.rank())) == expected


def main(output: Path) -> None:
    dist.init_process_group("gloo")
    rank = collective.rank()
    engine = Engine()
    collector: Any = AheadCollector(
        Collector(engine),  # type: ignore[arg-type]
        engine,  # type: ignore[arg-type]
        lambda step: 0.0,
        num_steps=STEPS,
        timeout_seconds=60,
    )
    num_brought = 0

    def bring_weights() -> None:
        nonlocal num_brought
        num_brought += 1
        for number in range(3):
            agree("export", number)

    for step in range(STEPS):
        collector.await_rollouts(bring_weights)
        drawn = collector.collect(step, 0.0)
        expected = [[(f"rollouts of step {step}", number, each) for each in (0, 1)] for number in range(ROUNDS)]
        assert drawn.questions == expected, drawn
        for number in range(ROUNDS):
            time.sleep(0.001 * (rank == number % 2))
            agree("update", number)
    collector.await_rollouts(bring_weights)
    assert (num_brought, engine.num_brought) == (1, 1)
    collector.close()
    collective.barrier()
    if rank == 0:
        output.write_text("done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
