"""Six shims that let megatron-core (0.16) run on the CPU with gloo. Installed by ``platform`` where there is no CUDA.

Each names the files of megatron-core that need it; ``tests/runtime/test_platform.py`` fails for a shim that
megatron-core no longer needs. Shims S4 and S5 change only calls made by ``megatron.*`` modules.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_modes: list[TorchFunctionMode] = []
"""The entered mode: it is active as long as the process."""


def install() -> None:
    """Install all six. Call once, before any model is built."""
    # megatron-core says on import, four times, that the fused CUDA kernels are missing; here that is no news.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    import torch._dynamo  # noqa: F401 - asserts on import that names in torch.cuda are distinct objects, so it goes first

    _current_device_and_synchronize()
    _random_state()
    _distributed_optimizer()
    mode = _MegatronOnCpu()
    mode.__enter__()
    _modes.append(mode)


def _current_device_and_synchronize() -> None:
    """S1 and S2: the current device is the CPU, and waiting for it is no work."""
    # S1: models/common/embeddings/rotary_pos_embedding.py, tensor_parallel/{mappings,layers}.py,
    #     pipeline_parallel/p2p_communication.py, distributed/param_and_grad_buffer.py, utils.py,
    #     dist_checkpointing/strategies/state_dict_saver.py
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]
    # S2: pipeline_parallel/p2p_communication.py, dist_checkpointing/strategies/{filesystem_async,fully_parallel}.py,
    #     timers.py
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None


def _random_state() -> None:
    """S3: the CUDA generator that the model-parallel RNG tracker forks is the CPU's (tensor_parallel/random.py)."""
    import megatron.core.tensor_parallel.random as megatron_random

    generator = torch.default_generator

    def get_state(device: object = None) -> torch.Tensor:
        return generator.get_state()

    def manual_seed(seed: int) -> None:
        generator.manual_seed(int(seed))

    def tracker_get(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return generator.get_state()

    def tracker_set(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
        generator.set_state(new_state)

    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = get_state
    torch.cuda.manual_seed = torch.cuda.random.manual_seed = manual_seed
    megatron_random._get_cuda_rng_state = tracker_get
    megatron_random._set_cuda_rng_state = tracker_set
    # The tracker warns when a forked region moves the CPU generator; here the CPU generator is what it forks.
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _called_by_megatron() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.")


class _MegatronOnCpu(TorchFunctionMode):
    """S4: ``device="cuda"``, ``.cuda()`` and pinned memory mean the CPU. S5: ``Tensor.type()`` names a CUDA type."""

    # S4: pipeline_parallel/schedules.py, optimizer/{optimizer,clip_grads}.py, utils.py, tensor_parallel/data.py,
    #     models/common/embeddings/rope_utils.py, dist_checkpointing/exchange_utils.py
    # S5: optimizer/{optimizer,distrib_optimizer,clip_grads}.py compare with the string 'torch.cuda.FloatTensor'

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs:
            if (_is_cuda(kwargs.get("device")) or kwargs.get("pin_memory")) and _called_by_megatron():
                kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
                if _is_cuda(kwargs.get("device")):
                    kwargs["device"] = _CPU
            return func(*args, **kwargs)
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory) and _called_by_megatron():
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and _called_by_megatron():
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args)


def _distributed_optimizer() -> None:
    """S6: torch's AdamW inside DistributedOptimizer, three faults around its 'step' entry.

    optimizer/distrib_optimizer.py: the fused Adams of TE and apex keep 'step' in the parameter group, torch keeps it
    with each parameter, where (a) ``_set_main_param_and_optimizer_states`` finds no source for it (KeyError), (b)
    ``load_state_dict`` gives every parameter the same step tensor, which then counts once for each parameter, and (c)
    ``sharded_state_dict`` asks for the state of an optimizer that has not stepped yet.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    load_state_dict = DistributedOptimizer.load_state_dict
    sharded_state_dict = DistributedOptimizer.sharded_state_dict

    def set_states_with_step(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, position = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][position]]
        own = {"step": state["step"]} if "step" in state else {}
        set_states(self, model_param, {**tensors, **own})

    def load_with_own_steps(self: Any, state_dict: dict[str, Any]) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    def sharded_with_state(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    self.optimizer.state[parameter].update(
                        step=torch.zeros(()),
                        exp_avg=torch.zeros_like(parameter),
                        exp_avg_sq=torch.zeros_like(parameter),
                    )
        return sharded_state_dict(self, *args, **kwargs)

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_with_step
    DistributedOptimizer.load_state_dict = load_with_own_steps
    DistributedOptimizer.sharded_state_dict = sharded_with_state
