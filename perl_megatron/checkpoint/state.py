"""Training state on disk: weights, optimizer, schedule and progress, whole or not at all.

    directory/step-00000020/
        .metadata, *.distcp, common.pt, metadata.json   megatron-core's torch_dist checkpoint (any layout loads it)
        training_state.json                             schedule, step, model and the caller's ``extra``
        manifest.json                                   size and digest of every other file (``checkpoint/manifest.py``)

torch_dist's own index is a pickle. Before it is loaded, an unpickler that knows only the parts of an index reads it;
objects inside the checkpoint are read as `weights_only`. So what would run code is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy, load_sharded_metadata
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from perl_megatron.checkpoint.manifest import (
    CONTINUE_FROM_ANOTHER,
    PendingCheckpoint,
    latest_checkpoint,
    verify_checkpoint,
)
from perl_megatron.checkpoint.retention import Retention, read_facts
from perl_megatron.checkpoint.state_gather import GatheredStates
from perl_megatron.checkpoint.state_optimizer import fit_to_optimizer
from perl_megatron.checkpoint.state_parts import StatePlanner
from perl_megatron.checkpoint.torch_dist_index import check_index
from perl_megatron.errors import UserError
from perl_megatron.model.policy import Policy
from perl_megatron.runtime import environment
from perl_megatron.runtime.collective import from_rank_zero, together

__all__ = ["latest_checkpoint", "load_training_state", "newest_checkpoint", "prepare_training_state"]

STATE = "training_state.json"


def prepare_training_state(
    directory: Path,
    step: int,
    modules: Sequence[Policy],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    extra: dict[str, Any],
    *,
    settings: Mapping[str, float],
    model: str | None = None,
    retention: Retention,
    planner: StatePlanner,
) -> Callable[[], Path]:
    """Copy the training state; what is returned writes the copy to ``directory/step-NNNNNNNN``. Both are collective.

    Training may go on in between, and while the copy is written by another thread, within ``collective.over`` a group
    of its own. If writing fails, all ranks raise UserError and earlier checkpoints are untouched; else those that
    ``retention`` does not keep are deleted.

    Args:
        directory: that of all checkpoints.
        step: steps done.
        modules: the model chunks without their DDP wrapper.
        optimizer: theirs.
        scheduler: the optimizer's.
        extra: what else is to be restored; must be JSON and equal on all ranks.
        settings: the options, by name, that must be the same where the checkpoint is continued.
        model: tells the model from others; a checkpoint of another one is not continued.
        retention: which checkpoints are kept, and what the manifest says of this one.
        planner: that of this state's earlier checkpoints, if there are any.

    Raises UserError, on all ranks, where not even an empty folder can be made.
    """
    content = {
        "step": step,
        "scheduler": scheduler.state_dict(),
        "settings": dict(settings),
        "model": model,
        "extra": extra,
    }
    state = json.dumps(content)
    pending = PendingCheckpoint.begin(directory, step)
    sharded, metadata, states = _sharded(modules, optimizer, is_loading=False)
    described = {name: value for name, value in metadata.items() if name != "dp_cp_group"}
    parts = planner.copy_parts(sharded, described, states, pending.temporary)

    def write() -> Path:
        try:
            names = parts.write()
            pending.write(STATE, state)
            return pending.commit(retention, names)
        except UserError:
            pending.discard()
            raise

    return write


def newest_checkpoint(
    directory: Path, *, up_to: int | None = None, run: str | None = None, model: str | None = None
) -> Path | None:
    """As ``latest_checkpoint``; one of another run or another model is passed over too. Collective."""

    def refuse(checkpoint: Path) -> None:
        written = {"run": read_facts(checkpoint).get("run"), "model": _read_state(checkpoint).get("model")}
        for name, ours in (("run", run), ("model", model)):
            if ours is not None and written[name] is not None and written[name] != ours:
                raise UserError(
                    f"the checkpoint belongs to another {name}: {written[name]}, not {ours}",
                    where=str(checkpoint),
                    fix=f"move it to where that {name} is trained",
                )

    return latest_checkpoint(directory, up_to=up_to, refuse=refuse)


def load_training_state(
    checkpoint: Path,
    modules: Sequence[Policy],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    *,
    settings: Mapping[str, float],
    verify: bool = True,
) -> dict[str, Any]:
    """Restore what ``prepare_training_state`` wrote, in this or another layout; returns its ``extra``. Collective.

    ``verify=False`` is for a checkpoint that ``latest_checkpoint`` has just read through. Raises UserError, naming the
    file, where the checkpoint is damaged, and where it belongs to another model or to other ``settings``.
    """
    if verify:
        verify_checkpoint(checkpoint)
    state = from_rank_zero(lambda: _read_state(checkpoint))
    _refuse_other_settings(state.get("settings", {}), settings, checkpoint)
    together(lambda: check_index(checkpoint))
    content, _, _ = _sharded(modules, optimizer, is_loading=True)
    try:
        with environment.weights_only_loads():
            _keep_unsaved_extra_state(content, checkpoint)
            strategy = get_default_load_sharded_strategy(str(checkpoint))
            loaded = dist_checkpointing.load(content, str(checkpoint), strategy)
    except (CheckpointException, CheckpointingException, KeyError, UnpicklingError) as error:
        raise UserError(
            f"the checkpoint does not fit this policy: {error}",
            where=str(checkpoint),
            fix="continue with the model.path, model.dtype and optimizer.distributed that it was written with",
        ) from error
    for index, module in enumerate(modules):
        module.load_state_dict(loaded[_model_key(index, modules)])
    fit_to_optimizer(loaded["optimizer"], optimizer)
    optimizer.load_state_dict(loaded["optimizer"])
    scheduler.num_steps = 0  # load_state_dict adds the checkpoint's count to it
    scheduler.load_state_dict(state["scheduler"])
    return state["extra"]


def _read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        return state
    except (OSError, ValueError) as error:
        raise UserError(
            f"this is no training checkpoint: {error}", where=str(checkpoint / STATE), fix=CONTINUE_FROM_ANOTHER
        ) from error


def _refuse_other_settings(saved: Mapping[str, float], current: Mapping[str, float], checkpoint: Path) -> None:
    """Checkpoints from before a setting was there say nothing about it, and are taken up."""
    changed = [name for name in current if saved.get(name, current[name]) != current[name]]
    if changed:
        written = " ".join(f"{name}={saved[name]}" for name in changed)
        raise UserError(
            f"the checkpoint was written with {written}",
            where=", ".join(f"{name} = {current[name]}" for name in changed),
            fix=f"continue with {written}, or start a new run from exported weights (model.path); {checkpoint} stays",
        )


def _sharded(
    modules: Sequence[Policy], optimizer: MegatronOptimizer, *, is_loading: bool
) -> tuple[dict[str, Any], dict[str, Any], GatheredStates]:
    """megatron-core's description of which part of each global tensor is this rank's, and the options behind it.

    The states of a distributed optimizer are not in it before they are asked for.
    """
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    content: dict[str, Any] = {
        _model_key(index, modules): module.sharded_state_dict(metadata=metadata) for index, module in enumerate(modules)
    }
    with GatheredStates.described(optimizer) as states:
        content["optimizer"] = optimizer.sharded_state_dict(dict(content), is_loading=is_loading, metadata=metadata)
    return content, metadata, states


def _keep_unsaved_extra_state(content: dict[str, Any], checkpoint: Path) -> None:
    """Ask only for those ``_extra_state`` objects that the checkpoint has; the model keeps the others as they are.

    TransformerEngine's modules hold the scales of fp8 there (empty without), also those whose counterpart in torch has
    nothing of the kind: so a checkpoint of torch's layers, or a converted one, lacks some.
    """
    saved = load_sharded_metadata(str(checkpoint)).keys()

    def wanted(value: Any) -> Any:
        is_extra = isinstance(value, ShardedObject) and value.key.endswith("._extra_state")
        return LocalNonpersistentObject(value.data) if is_extra and value.unique_key not in saved else value

    dict_list_map_inplace(wanted, content)


def _model_key(index: int, modules: Sequence[Policy]) -> str:
    return "model" if len(modules) == 1 else f"model{index}"
