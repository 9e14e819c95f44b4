"""Two threads of each rank agree at the same time, over two groups, in opposite orders: no call may meet another's.

Then one rank waits for the other in vain, as long as its group says.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

from perl_megatron.runtime import collective

ROUNDS = 50


def main(output: Path) -> None:
    dist.init_process_group("gloo")
    rank = collective.rank()
    group = collective.new_group(timeout_seconds=60)
    assert group is not None
    beside: list[list[str]] = []

    def work() -> None:
        with collective.over(group):
            for number in range(ROUNDS):
                beside.append(collective.gather_objects(f"thread {number} of {rank}"))
                time.sleep(0.001 * (rank == number % 2))
            assert collective.any_rank(rank == 1)
            collective.barrier()

    thread = threading.Thread(target=work)
    thread.start()
    main_thread = []
    for number in range(ROUNDS):
        time.sleep(0.001 * (rank != number % 2))
        main_thread.append(collective.gather_objects((number, rank)))
    thread.join()
    assert main_thread == [[(number, 0), (number, 1)] for number in range(ROUNDS)]
    assert beside == [[f"thread {number} of {each}" for each in (0, 1)] for number in range(ROUNDS)]
    assert collective.shared_map(lambda item: (item, rank), "abc") == [("a", 0), ("b", 1), ("c", 0)]
    batches = collective.shared_batches(lambda mine: [(item, len(mine)) for item in mine], "abc")
    assert batches == [("a", 2), ("b", 1), ("c", 2)]
    collective.barrier()
    impatient = collective.new_group(timeout_seconds=3)
    begin = time.monotonic()
    if rank == 0:
        try:
            with collective.over(impatient):
                collective.gather_objects("nobody else comes")
            raise AssertionError("the other rank was not missed")
        except RuntimeError:
            assert 2 < time.monotonic() - begin < 30
        output.write_text("done")
    else:
        while not output.exists() and time.monotonic() < begin + 30:
            time.sleep(0.05)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
