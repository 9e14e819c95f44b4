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
        with self.phases("data"), self.encoder.waits("questions"):
            questions = self.questions.next(self.config.supervised.batch_size)
            return [self._demonstration(question.record) for question in questions if question.problem is None]

    def log_supervised_step(self, step: int, metrics: dict[str, float]) -> None:
        """Log one supervised step."""
        times = self.phases.take()
        idle = self.data_idle.follow(self.encoder.take_waits(), times["seconds/step"])
        self.journal.step(step, {**metrics, **self.save_times(), **idle, **times})

    def _demonstration(self, record: Record) -> TrainingSequence:
        assert record.demonstration is not None, "records without demonstration are dropped at load"
        return TrainingSequence(self._prompt(record), self.encoder.encode_response(record.demonstration))

    def _prompt(self, record: Record) -> EncodedPrompt:
        return self.encoder.encode(apply_order(record, range(len(record.images)), 0))
