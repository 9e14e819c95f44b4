"""What the workers of a vLLM server do for a trainer, beside vLLM's own work: attestation and weights from a folder.

vLLM adds the methods to its workers (``--worker-extension-cls``), and the trainer calls them through its HTTP route
`/collective_rpc`: arguments and results are JSON. Importing this file also makes the gloo transport known to vLLM.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import read_architecture
from perl_megatron.rollout import vllm_gloo, vllm_holdings
from perl_megatron.rollout.attestation import Attestor, without_raising
from perl_megatron.rollout.fingerprints import Fingerprints
from perl_megatron.rollout.vllm_counters import ImageCounter

vllm_gloo.register()


class WorkerExtension:
    """Mixed into vLLM's worker class. The methods of all workers of a server are called together."""

    _perl_state: _State | None = None

    def perl_describe(self) -> dict[str, Any]:
        """What this worker is: an identity that a restart changes, the settings that matter, and what it holds."""
        worker: Any = self
        config = worker.vllm_config
        transfer = config.weight_transfer_config
        return {
            "identity": self._perl().identity,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "logprobs_mode": str(config.model_config.logprobs_mode),
            "max_model_len": config.model_config.max_model_len,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "transport": None if transfer is None else transfer.backend,
        }

    def perl_places(self) -> dict[str, Any]:
        """The parts of published tensors that this worker holds, each as the fields of a ``Place``; or a problem."""
        try:
            return {"places": [list(astuple(place)) for place in self._perl().attestor.places()], "problem": None}
        except UserError as error:  # a parameter that is not understood
            return {"places": [], "problem": error.what}

    def perl_expect(self, version: int, full: bool, attests: bool) -> None:
        """An update begins: watch what is loaded (``attests``), and forget an earlier one that was cut off."""
        worker: Any = self
        state = self._perl()
        if state.is_updating:
            state.stop_watching()
            worker._weight_update_active = False
            _forget_partial_update(state.model, worker)
        state.is_updating = True
        if attests:
            state.watch(version=version, full=full)

    def perl_conclude(self) -> dict[str, Any]:
        """An update is over: the fingerprints of what came, and what does not hold it, in words."""
        state = self._perl()
        state.stop_watching()
        state.is_updating = False
        vllm_holdings.renew_output_layer(state.model, tied=state.tied)
        if state.received is None:
            return {"received": {}, "problems": []}
        received, state.received = state.received.values, None
        return {"received": received, "problems": without_raising(state.attestor.problems)}

    def perl_load_folder(self, folder: str) -> None:
        """Load the weights of a Hugging Face folder, in place, as `perl_expect` announced."""
        worker: Any = self
        checkpoint = open_checkpoint(folder)

        def stream() -> Iterator[tuple[str, Tensor]]:
            for name in checkpoint:
                yield name, checkpoint[name].to(worker.model_config.dtype)

        worker.model_runner.reload_weights(weights_iterator=stream())

    def perl_sums(self) -> list[list[Any]]:
        """[fields of a ``Place``, checksum] of all that this worker holds: see ``Attestor.sums``."""
        return [[list(astuple(place)), value] for place, value in self._perl().attestor.sums()]

    def perl_encoded_images(self) -> list[int]:
        """How many images the vision tower has looked at since `perl_describe`."""
        return [self._perl().counter.num_images]

    def _perl(self) -> _State:
        worker: Any = self
        if self._perl_state is None:
            tied = read_architecture(worker.model_config.model).tied_embeddings
            self._perl_state = _State(worker.model_runner.get_model(), tied=tied)
        return self._perl_state


class _State:
    """What the extension remembers of a worker."""

    def __init__(self, model: Any, *, tied: bool):
        self.model, self.tied = model, tied
        self.identity = uuid.uuid4().hex
        self._attestor: Attestor | None = None
        self.counter = ImageCounter(model)
        self.received: Fingerprints | None = None
        self.is_updating = False

    @property
    def attestor(self) -> Attestor:
        """Made when it is first needed: a model that is not understood can still be used without."""
        if self._attestor is None:
            model = self.model
            holdings = vllm_holdings.holdings(model, tied=self.tied)
            self._attestor = Attestor(holdings, lambda: vllm_holdings.buffers(model))
        return self._attestor

    def watch(self, *, version: int, full: bool) -> None:
        """See every tensor that is loaded from now on, whichever way it comes."""
        received = self.received = Fingerprints(version=version, full=full)
        attestor = self.attestor
        attestor.expect(version=version, full=full)
        load = type(self.model).load_weights

        def watched(weights: Any) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                received.see(name, tensor)
                attestor.see(name, tensor)
                yield name, tensor

        self.model.load_weights = lambda weights: load(self.model, watched(weights))

    def stop_watching(self) -> None:
        """Load as vLLM does."""
        self.model.__dict__.pop("load_weights", None)


def _forget_partial_update(model: nn.Module, worker: Any) -> None:
    """Take a model out of a reload that was cut off: the layers' loaders would go on counting from there."""
    with set_current_vllm_config(worker.vllm_config):
        finalize_layerwise_reload(model, worker.model_config)
