"""A server's worker that spoils its own weights when a test tells it to."""

from corruptions import Corruptor

from perl_megatron.rollout.vllm_worker import WorkerExtension


class CorruptibleExtension(WorkerExtension):
    """With one method more."""

    _corruptor = None

    def corrupt(self, kind: str, server_is_chosen: bool) -> None:
        """From now on in every update; on the last worker of the chosen server."""
        if self._corruptor is None:
            self._corruptor = Corruptor(self.model_runner.get_model(), corrupts=False)
        is_last = self.rank == self.vllm_config.parallel_config.world_size - 1
        self._corruptor.corrupts = is_last and server_is_chosen
        self._corruptor.switch(kind)
