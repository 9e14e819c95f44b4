"""Shim S6: torch's AdamW inside megatron-core's DistributedOptimizer, four faults around its 'step' entry.

Needed wherever neither TransformerEngine's nor apex's fused Adam is installed, with or without CUDA.
optimizer/distrib_optimizer.py: the fused Adams keep 'step' in the parameter group, torch keeps it with each parameter,
where (a) ``_set_main_param_and_optimizer_states`` finds no source for it (KeyError), (b) ``load_state_dict`` gives all
parameters one step tensor, which then counts once for each of them, (c) ``sharded_state_dict`` asks for the state of an
optimizer that has not stepped yet, and (d) ``state_dict`` asks for the step of a rank that has nothing to train (a
pipeline stage of a frozen language model).
"""

from __future__ import annotations

from typing import Any

import torch


def install() -> None:
    """Mend ``DistributedOptimizer`` if it uses torch's AdamW. Call once, before any optimizer is built."""
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    cls = distrib_optimizer.DistributedOptimizer
    set_states = cls._set_main_param_and_optimizer_states
    load_state_dict = cls.load_state_dict
    sharded_state_dict = cls.sharded_state_dict
    state_dict = cls.state_dict

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

    def state_dict_of_any_rank(self: Any) -> dict[str, Any]:
        if any(group["params"] for group in self.optimizer.param_groups):
            return state_dict(self)
        groups = [
            {**{name: value for name, value in group.items() if name != "params"}, "step": 0.0}
            for group in self.optimizer.state_dict()["param_groups"]
        ]
        return {"optimizer": {"param_groups": groups}}

    cls.state_dict = state_dict_of_any_rank
    cls._set_main_param_and_optimizer_states = set_states_with_step
    cls.load_state_dict = load_with_own_steps
    cls.sharded_state_dict = sharded_with_state
