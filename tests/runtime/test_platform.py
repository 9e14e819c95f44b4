"""The eleven shims. Each has a test that fails once megatron-core no longer needs it: then the shim should go."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import megatron.core
import pytest
import torch
from megatron.core import jit
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.models.common.embeddings import rotary_pos_embedding
from megatron.core.optimizer import distrib_optimizer, optimizer
from megatron.core.pipeline_parallel import p2p_communication, schedules
from megatron.core.tensor_parallel import layers, mappings
from megatron.core.tensor_parallel import random as megatron_random

from perl_megatron.config.schema import ParallelConfig
from perl_megatron.runtime import platform, topology
from perl_megatron.runtime.megatron_cpu import MODULES_THAT_NAME_CUDA

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shims are for machines without CUDA")


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (rotary_pos_embedding, "device=torch.cuda.current_device()"),
        (mappings, "device=torch.cuda.current_device()"),
        (p2p_communication, "device=torch.cuda.current_device()"),
        (param_and_grad_buffer, "device=torch.cuda.current_device()"),
        (p2p_communication, "torch.cuda.synchronize()"),
        (megatron_random, "torch.cuda.get_rng_state()"),
        (megatron_random, "torch.cuda.manual_seed("),
        (layers, "fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(\n"),
        (jit, "jit_fuser = torch.compile\n"),
        (optimizer, "'torch.cuda.FloatTensor'"),
        (distrib_optimizer, "'torch.cuda.FloatTensor'"),
        (distrib_optimizer, 's["step"] = step\n'),
        (distrib_optimizer, 'for s in inner_state_dict["state"].values()]))\n            assert len(steps) == 1'),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__.rpartition(".")[2],
)
def test_megatron_core_still_needs_the_shim(module, text):
    with open(inspect.getsourcefile(module)) as source:
        assert text in source.read(), f"{module.__name__} has changed: see megatron_cpu.py, megatron_adam.py"


_NOT_USED_HERE = (
    "energy_monitor",
    "fp8_utils",
    "full_cuda_graph",
    "nccl_allocator",
    "pipeline_parallel.fine_grained_activation_offload",
    "pipeline_parallel.hybrid_cp_schedule",
    "pipeline_parallel.utils",
    "rerun_state_machine",
)
_NOT_USED_FOLDERS = re.compile(
    r"(distributed\.fsdp|export|extensions|fusions|inference|models\.(?!common\.)|post_training|quantization|resharding"
    r"|ssm|transformer\.(?!utils$))"
)


def test_the_modules_that_name_cuda_are_those_listed():
    """S4: a module that no longer does should leave the list, a new one join it (or be named as not used above)."""
    root = Path(megatron.core.__path__[0])
    names_cuda = re.compile(r"""device=["']cuda|pin_memory=True""")
    found = {
        ".".join(file.relative_to(root).with_suffix("").parts)
        for file in root.rglob("*.py")
        if names_cuda.search(file.read_text())
    }
    used = {name for name in found if not _NOT_USED_FOLDERS.match(name) and name not in _NOT_USED_HERE}
    assert used == set(MODULES_THAT_NAME_CUDA)


def test_device_and_backend():
    platform.install()
    platform.install()  # idempotent
    assert platform.device() == torch.device("cpu")
    assert platform.backend() == "gloo"
    assert torch.zeros(2, device=torch.cuda.current_device()).device.type == "cpu"
    torch.cuda.synchronize()


def test_forked_random_streams_are_reproducible_and_leave_the_default_alone():
    platform.install()
    tracker = megatron_random.CudaRNGStatesTracker()
    tracker.add("stream", 7)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with tracker.fork("stream"):
        first = torch.rand(2)
    assert torch.equal(torch.rand(3), expected)
    with tracker.fork("stream"):
        second = torch.rand(2)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(4), torch.cat([first, second]))


def test_only_megatrons_calls_are_changed():
    platform.install()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    assert torch.zeros(1).type() == "torch.FloatTensor"
    from_megatron = {"torch": schedules.torch, "__name__": "megatron.core.example"}
    exec("zeros = torch.zeros(1, device='cuda'); kind = zeros.type(); same = zeros.cuda()", from_megatron)
    assert from_megatron["zeros"].device.type == "cpu"
    assert from_megatron["kind"] == "torch.cuda.FloatTensor"
    assert from_megatron["same"] is from_megatron["zeros"]


WITH_CUDA = """
import torch
torch.cuda.is_available = lambda: True
before = torch.cuda.current_device, torch.cuda.synchronize, torch.Tensor.type
from perl_megatron.runtime import platform
platform.install()
assert before == (torch.cuda.current_device, torch.cuda.synchronize, torch.Tensor.type)
from megatron.core.optimizer import distrib_optimizer
assert not distrib_optimizer.HAVE_APEX_OR_TE
print(distrib_optimizer.DistributedOptimizer.load_state_dict.__module__)
"""


WITHOUT_CUDA = """
import sys
import torch
torch.cuda.is_available = lambda: False
compiler = torch.compile
from perl_megatron.runtime import platform
platform.install()
import perl_megatron.jobs
assert torch.compile is compiler
from megatron.core.fusions import fused_bias_geglu, fused_pad_routing_map  # one of them is imported only now
assert not hasattr(fused_bias_geglu.bias_geglu, "_torchdynamo_orig_callable")
print(*({"torch._inductor.compile_fx", "matplotlib", "openai", "vllm"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("name", ["dist_reduce_scatter_func", "dist_all_gather_func"])
def test_a_rank_alone_moves_nothing(name):
    """gloo itself copies what it is given; once it no longer does, the shim can go."""
    topology.initialize(ParallelConfig(), seed=0, timeout_seconds=60)
    try:
        data = torch.arange(5.0)
        collective = getattr(param_and_grad_buffer, name)

        def copies(call):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
                call(data, data, group=torch.distributed.group.WORLD, async_op=False)
            return sum(event.count for event in trace.key_averages() if event.key == "aten::copy_")

        assert copies(collective) == 0
        assert copies(collective.__wrapped__) > 0
        other = torch.zeros(5)
        collective(other, data, group=torch.distributed.group.WORLD, async_op=False)
        assert other.tolist() == data.tolist() == [0, 1, 2, 3, 4]
    finally:
        topology.shutdown()


def test_weight_gradients_are_added_up_in_float32():
    """Each is a quarter of bfloat16's last place of the sum, which would swallow them one by one."""
    inputs, gradients = torch.ones(1, 3, dtype=torch.bfloat16), torch.full((1, 2), 2.0**-10, dtype=torch.bfloat16)
    buffer = torch.ones(2, 3)
    for _ in range(8):
        layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(inputs, gradients, buffer)
    assert (buffer == 1 + 8 * 2.0**-10).all()
    assert layers._grad_accum_fusion_available


@pytest.mark.parametrize("name", ["copy_to_tensor_model_parallel_region", "reduce_from_tensor_model_parallel_region"])
def test_a_rank_without_tensor_peers_passes_through_no_autograd_function(name):
    topology.initialize(ParallelConfig(), seed=0, timeout_seconds=60)
    try:
        tensor, mapping = torch.ones(2, requires_grad=True), getattr(layers, name)
        alone = torch.distributed.group.WORLD
        assert mapping(tensor, alone) is tensor
        assert mapping.__wrapped__(tensor, alone) is not tensor, "upstream does it too: the shim can go"
        assert mapping(tensor).grad_fn is not None
    finally:
        topology.shutdown()


def test_what_no_rank_needs_to_start_is_not_loaded():
    """S11; drawing and endpoints too are loaded by whoever uses them."""
    run = subprocess.run([sys.executable, "-c", WITHOUT_CUDA], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_without_a_fused_adam_the_optimizer_is_mended_on_cuda_too():
    """S6: neither TransformerEngine nor apex has to be installed, and torch's AdamW is no matter of the device."""
    run = subprocess.run([sys.executable, "-c", WITH_CUDA], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["perl_megatron.runtime.megatron_adam"]
