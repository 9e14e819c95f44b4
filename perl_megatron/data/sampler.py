"""The order in which training takes its records: a new shuffle every epoch, resumable from two numbers."""

from __future__ import annotations

from perl_megatron.errors import UserError
from perl_megatron.runtime.rng import generator


class ShuffledSampler:
    """An endless stream of record indices, every index once an epoch.

    The shuffle of epoch e depends on (seed, e) alone, so the state is a position, not a generator's.
    """

    def __init__(self, num_records: int, seed: int):
        assert num_records >= 1
        self.num_records, self.seed = num_records, seed
        self.num_drawn = 0
        self._shuffled_epoch, self._shuffle = -1, [0] * num_records

    @property
    def epoch(self) -> int:
        """The 0-based epoch of the next index."""
        return self.num_drawn // self.num_records

    def next(self, count: int) -> list[int]:
        """The next ``count`` indices. A call that reaches into the next epoch can hold an index twice."""
        drawn = []
        for _ in range(count):
            if self._shuffled_epoch != self.epoch:
                self._shuffle = generator(self.seed, "shuffle", self.epoch).permutation(self.num_records).tolist()
                self._shuffled_epoch = self.epoch
            drawn.append(self._shuffle[self.num_drawn % self.num_records])
            self.num_drawn += 1
        return drawn

    def state_dict(self) -> dict[str, int]:
        """The position, and what it is a position in; JSON-serialisable."""
        return {"num_records": self.num_records, "seed": self.seed, "num_drawn": self.num_drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from ``state``. Raises ``UserError`` if it was saved for other data or another seed."""
        for name, value in (("num_records", self.num_records), ("seed", self.seed)):
            if state[name] != value:
                raise UserError(
                    f"the checkpoint was saved with {name} = {state[name]}, but now it is {value}",
                    where="data.train" if name == "num_records" else "run.seed",
                    fix="resume with the same dataset and seed, or start a new run from the exported model",
                )
        self.num_drawn = state["num_drawn"]
