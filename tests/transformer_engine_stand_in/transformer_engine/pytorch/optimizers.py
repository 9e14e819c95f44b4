"""`transformer_engine.pytorch.optimizers`: FusedAdam with TransformerEngine's form of state, in plain torch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

Lists = Sequence[Sequence[torch.Tensor]]


def multi_tensor_applier(kernel: Callable[..., Any], no_op: torch.Tensor, tensors: Lists, *arguments: Any) -> Any:
    return kernel(2048 * 32, no_op, tensors, *arguments)


def multi_tensor_l2norm(
    chunk: int, no_op: torch.Tensor, tensors: Lists, per_tensor: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors[0]])
    return torch.linalg.vector_norm(norms)[None], norms if per_tensor else None


def multi_tensor_scale(chunk: int, no_op: torch.Tensor, tensors: Lists, scale: float) -> None:
    for source, target in zip(*tensors, strict=True):
        target.copy_(source * scale)


def multi_tensor_adam(
    chunk: int,
    no_op: torch.Tensor,
    tensors: Lists,
    rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    decoupled: int,
    bias_correction: int,
    decay: float,
) -> None:
    """AdamW. ``step`` becomes a C++ int, which refuses a float (TypeError)."""
    step = operator.index(step)
    assert decoupled == 1
    assert bias_correction == 1
    for gradient, weight, mean, square in zip(*tensors, strict=True):
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (square / (1 - beta2**step)).sqrt_().add_(epsilon)
        weight.sub_(rate * (mean / (1 - beta1**step) / denominator + decay * weight))


class FusedAdam(torch.optim.Optimizer):
    """As in TransformerEngine's `pytorch/optimizers/fused_adam.py`, of what megatron-core uses in float32.

    Each parameter has two moments and nothing else; the steps are counted in the parameter group; an option that the
    group lacks is an error.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
    ):
        options = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**options, "weight_decay": weight_decay})
        self.adam_w_mode = 1 if adam_w_mode else 0
        self._no_op = torch.tensor([0], dtype=torch.int)
        self._dtypes = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Looks each state's dtype up by its name: there is none for 'step'."""
        super().load_state_dict(dict(state_dict))
        for parameter, states in self.state.items():
            self.state[parameter] = {name: value.to(self._dtypes[name]).clone() for name, value in states.items()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            bias_correction = 1 if group["bias_correction"] else 0
            if "step" in group:
                group["step"] += 1
            else:
                group["step"] = 1
            for parameter in group["params"]:
                if not self.state[parameter]:
                    zeros = {name: torch.zeros_like(parameter, dtype=dtype) for name, dtype in self._dtypes.items()}
                    self.state[parameter].update(zeros)
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            moments = ([self.state[parameter][name] for parameter in trained] for name in self._dtypes)
            multi_tensor_applier(
                multi_tensor_adam,
                self._no_op,
                [[parameter.grad for parameter in trained], trained, *moments],
                group["lr"],
                *group["betas"],
                group["eps"],
                group["step"],
                self.adam_w_mode,
                bias_correction,
                group["weight_decay"],
            )


class FusedSGD(torch.optim.SGD):
    """Only its name is needed."""
