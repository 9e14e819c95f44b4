"""Two threads of each rank agree at the same time, over two groups, in opposite orders: no call may meet another's.

Errors that some ranks meet are those of all. At last one rank waits for the other in vain, as long as its group says.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from perl_megatron.errors import UserError
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
    assert collective.gather_on_rank_zero("ab"[rank] * (1 + rank)) == (["a", "bb"] if rank == 0 else None)
    on_zero = collective.shared_map_on_rank_zero(lambda item: (item, rank), "abc")
    assert on_zero == ([("a", 0), ("b", 1), ("c", 0)] if rank == 0 else None)
    agree_on_errors(rank)
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


def agree_on_errors(rank: int) -> None:
    """Whichever ranks could not do their part: all raise the lowest rank's error, and the next agreement is whole."""

    class ItsOwnError(UserError):
        def __init__(self, who: int):
            super().__init__(f"not for {who}", where="here", fix=f"ask {1 - who}")

    for unable in ([1], [0], [0, 1]):

        def work(item: object, unable: list[int] = unable) -> object:
            if rank in unable:
                raise ItsOwnError(rank)
            return item

        for attempt in (
            lambda: collective.together(lambda: work("done")),
            lambda: collective.shared_map(work, "abc"),
            lambda: collective.shared_batches(lambda mine: [work(item) for item in mine], "abc"),
        ):
            try:
                attempt()
                raise AssertionError(f"rank {rank} was not told")
            except UserError as error:
                met = (error.what, error.where, error.fix)
            assert met == (f"not for {unable[0]}", "here", f"ask {1 - unable[0]}"), met
            assert collective.gather_objects((rank, unable)) == [(0, unable), (1, unable)]
    assert collective.together(lambda: rank) == rank
    assert collective.from_rank_zero(lambda: f"rank {rank} has seen it") == "rank 0 has seen it"
    for error in (UserError("rank 0 cannot read it", fix="repair"), PermissionError(13, "not allowed", "file")):

        def refuse(error: Exception = error) -> None:
            assert rank == 0, "only rank 0 is asked"
            raise error

        with pytest.raises(type(error)) as told:
            collective.from_rank_zero(refuse)
        assert str(told.value) == str(error)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
