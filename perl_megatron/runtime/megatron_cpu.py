"""Ten shims that let megatron-core (0.16) run on the CPU with gloo. Installed by ``platform`` where there is no CUDA.

S6 is ``megatron_adam``'s, S10 ``megatron_rotary``'s.
Each names the files of megatron-core that need it; ``tests/runtime/test_platform.py`` fails for a shim that
megatron-core no longer needs. S4 and S5 change only calls made by ``megatron.*`` modules.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

from perl_megatron.runtime import megatron_rotary

_CPU = torch.device("cpu")


def install() -> None:
    """Install all ten. Call once, before any model is built."""
    # megatron-core says on import, four times, that the fused CUDA kernels are missing; here that is no news.
    warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
    import torch._dynamo  # noqa: F401 - asserts on import that names in torch.cuda are distinct objects, so it goes first

    _without_the_compiler()
    _current_device_and_synchronize()
    _random_state()
    _tensor_creation()
    _type_names()
    _collectives_of_one_rank()
    _weight_gradients()
    _tensor_parallelism_of_one_rank()
    megatron_rotary.install()


def _without_the_compiler() -> None:
    """S11: what megatron-core gives to torch.compile stays as it is written.

    jit.py and who imports it, above all fusions/: no function that is called on a CPU (model/transformer_configs.py).
    To load the compiler takes every process a second of its start; to use it, half a minute.
    """
    compiler = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment, misc]
    try:
        import megatron.core.jit as jit
    finally:
        torch.compile = compiler
    jit.disable_jit_fuser()  # for modules that are imported later


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


_FACTORIES = ("empty", "empty_like", "full", "ones", "tensor", "zeros", "zeros_like")


class _TorchOnCpu:
    """Stands for ``torch`` inside one module of megatron-core: tensors that ask for CUDA are made on the CPU."""

    def __init__(self) -> None:
        for name in _FACTORIES:
            setattr(self, name, _made_on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _made_on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _tensor_creation() -> None:
    """S4: in the modules that write ``device="cuda"``, that means the CPU; so does ``.cuda()``, called by megatron."""
    # Replacing torch within these modules costs the rest of the process nothing; a TorchFunctionMode would find the
    # call sites by itself, but makes every torch call slower (half as long again for a step of a tiny model).
    for name in MODULES_THAT_NAME_CUDA:
        importlib.import_module(f"megatron.core.{name}").torch = _TorchOnCpu()  # type: ignore[attr-defined]
    # .cuda(): models/common/language_module/language_module.py (tied embeddings over stages), utils.py,
    #     optimizer/{optimizer,distrib_optimizer}.py, dist_checkpointing/exchange_utils.py
    # .pin_memory(): distributed/param_and_grad_buffer.py
    torch.Tensor.cuda = _for_megatron(torch.Tensor.cuda, lambda tensor, *_, **__: tensor)  # type: ignore[method-assign]
    torch.Tensor.pin_memory = _for_megatron(  # type: ignore[method-assign]
        torch.Tensor.pin_memory, lambda tensor, *_, **__: tensor
    )


MODULES_THAT_NAME_CUDA = (
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.state_dict_saver",
    "distributed.param_and_grad_buffer",
    "models.common.embeddings.rope_utils",
    "optimizer.clip_grads",
    "optimizer.grad_scaler",
    "optimizer.optimizer",
    "pipeline_parallel.schedules",
    "tensor_parallel.data",
    "transformer.utils",
    "utils",
)


def _type_names() -> None:
    """S5: ``Tensor.type()`` names a CUDA type when megatron asks."""
    # optimizer/{optimizer,distrib_optimizer,clip_grads}.py compare it with the string 'torch.cuda.FloatTensor'
    original = torch.Tensor.type

    def cuda_name(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(tensor, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = _for_megatron(original, cuda_name)  # type: ignore[method-assign, assignment]


def _collectives_of_one_rank() -> None:
    """S7: a rank that is alone in its group reduces gradients and gathers parameters in place, as NCCL has it."""
    # distributed/param_and_grad_buffer.py; gloo copies the whole buffer to a new one and back.
    import megatron.core.distributed.param_and_grad_buffer as buffers

    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(buffers, name, _in_place_alone(getattr(buffers, name)))


def _in_place_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(output: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        alone = kwargs["group"].size() == 1 and not kwargs["async_op"]
        if alone and output.data_ptr() == source.data_ptr() and output.shape == source.shape:
            return None
        return collective(output, source, *args, **kwargs)

    return call


def _weight_gradients() -> None:
    """S8: weight gradients are added to their float32 buffers within the matrix product, as by apex's kernel."""
    # tensor_parallel/layers.py; without, each is made in the weight's dtype first, in memory of its own.
    import megatron.core.tensor_parallel.layers as layers

    def accumulate(inputs: torch.Tensor, output_gradients: torch.Tensor, buffer: torch.Tensor) -> None:
        buffer.addmm_(output_gradients.t().to(buffer.dtype), inputs.to(buffer.dtype))

    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    layers._grad_accum_fusion_available = True


def _tensor_parallelism_of_one_rank() -> None:
    """S9: a rank alone in its tensor-parallel group does not pass through autograd functions that do nothing."""
    # tensor_parallel/layers.py; upstream's return their input, but cost as much as a small layer's arithmetic.
    import megatron.core.tensor_parallel.layers as layers

    for name in ("copy_to_tensor_model_parallel_region", "reduce_from_tensor_model_parallel_region"):
        setattr(layers, name, _identity_alone(getattr(layers, name)))


def _identity_alone(mapping: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(mapping)
    def call(tensor: torch.Tensor, group: Any = None) -> torch.Tensor:
        return tensor if group is not None and group.size() == 1 else mapping(tensor, group)

    return call


def _for_megatron(original: Callable[..., Any], replacement: Callable[..., Any]) -> Any:
    """A method that is ``replacement`` when a module of megatron calls it, and ``original`` for everybody else."""

    @functools.wraps(original)
    def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return (replacement if caller.startswith("megatron.") else original)(self, *args, **kwargs)

    return method
