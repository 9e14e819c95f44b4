"""A run of the supervised warm start in progress."""

from __future__ import annotations

from perl_megatron.data.permutation import apply_order
from perl_megatron.session import Session
from perl_megatron.train.batch import TrainingSequence
from perl_megatron.types import EncodedPrompt, Record


class SupervisedSession(Session):
    """Imitation of demonstrations."""

    supervised = True

    def demonstrations(self) -> list[TrainingSequence]:
        """The next batch, each question in its original order."""
        sequences = []
        for question in self.questions.next(self.config.supervised.batch_size):
            record = question.record
            if question.problem is not None:
                continue
            assert record.demonstration is not None, "records without demonstration are dropped at load"
            sequences.append(TrainingSequence(self._prompt(record), self.encoder.encode_response(record.demonstration)))
        return sequences

    def log_supervised_step(self, step: int, metrics: dict[str, float]) -> None:
        """Log one supervised step."""
        self.journal.step(step, {**metrics, **self.save_times(), **self.phases.take()})

    def _prompt(self, record: Record) -> EncodedPrompt:
        return self.encoder.encode(apply_order(record, range(len(record.images)), 0))
