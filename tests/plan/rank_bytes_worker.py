"""What ranks of a layout really hold, as JSON: `rank_bytes_worker.py CASES`, CASES being a JSON file with a list.

A case: `model` (a config.json's folder), `settings` (overrides), `world_size`, `ranks`, and `meta`: whether tensors
have no memory. One process is one rank after the other, through the product's own start of layout, policy, optimizer;
the process group is torch's fake one, in which nothing is sent. Without `meta` the optimizer makes a step, so that its
state is there. Gives for each rank its place, the numbers of each parameter, and bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from perl_megatron.runtime import platform

platform.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from perl_megatron.checkpoint.qwen25_vl_table import canonical_megatron_name  # noqa: E402
from perl_megatron.config.load import load_config  # noqa: E402
from perl_megatron.model.architecture import read_architecture  # noqa: E402
from perl_megatron.model.policy import build_policy  # noqa: E402
from perl_megatron.runtime import topology  # noqa: E402
from perl_megatron.train.optimizer import Optimizer  # noqa: E402

new_group = dist.new_group


def new_fake_group(*args: Any, **options: Any) -> dist.ProcessGroup | None:
    return new_group(*args, **(options | {"backend": "fake"}))


dist.new_group = new_fake_group  # type: ignore[assignment]
platform.rank_and_world_size = lambda: (dist.get_rank(), dist.get_world_size())


type_name = torch.Tensor.type


def cuda_type_name(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
    """megatron-core compares it with 'torch.cuda.BFloat16Tensor'."""
    name = type_name(tensor, *args, **options)
    return name.replace("torch.meta.", "torch.cuda.") if isinstance(name, str) and tensor.is_meta else name


def bytes_of(tensors: Any) -> int:
    """Of the memory behind tensors, each piece once."""
    pieces = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(pieces.values())


def optimizer_bytes(optimizer: Any, parameters: list[torch.Tensor], *, has_state: bool) -> int:
    """Moments, and main weights that are no views of the parameters."""
    inner = optimizer.megatron
    if inner.optimizer is None:  # nothing to train here
        return 0
    owned = {parameter.untyped_storage()._cdata for parameter in parameters}
    main = [one for group in inner.optimizer.param_groups for one in group["params"]]
    if has_state:
        moments = [one for state in inner.optimizer.state.values() for key, one in state.items() if key != "step"]
        assert len(moments) == 2 * len(main)
        moment_bytes = bytes_of(moments)
    else:
        moment_bytes = sum(2 * 4 * one.numel() for one in main)
    return moment_bytes + bytes_of(one for one in main if one.untyped_storage()._cdata not in owned)


def measure(case: dict[str, Any], rank: int) -> dict[str, Any]:
    settings = [f"model.path={case['model']}", "rollout.engine=embedded", *case["settings"]]
    config = load_config(None, settings).config
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=case["world_size"])
    place = topology.initialize(config.parallel, seed=0, timeout_seconds=60)
    device = torch.device("meta" if case["meta"] else "cpu")
    torch.cuda.current_device = lambda: device  # type: ignore[assignment,return-value]
    platform.device = lambda: device
    torch.Tensor.type = cuda_type_name if case["meta"] else type_name  # type: ignore[method-assign]
    with device:
        modules = build_policy(read_architecture(config.model.path), config.model, config.parallel, place)
    optimizer = Optimizer(config.optimizer, modules, total_steps=1)
    if not case["meta"]:
        optimizer.zero_gradients()
        optimizer.step(loss=0.0)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    buffers = [buffer for chunk in optimizer.chunks for buffer in chunk.buffers]
    result = {
        "place": [place.pipeline_rank, place.data_rank, place.context_rank, place.tensor_rank],
        "counts": [
            {canonical_megatron_name(name): parameter.numel() for name, parameter in module.named_parameters()}
            for module in modules
        ],
        "parameters": bytes_of(parameters),
        "gradients": bytes_of(buffer.grad_data for buffer in buffers),
        "optimizer": optimizer_bytes(optimizer, parameters, has_state=not case["meta"]),
    }
    topology.shutdown()
    return result


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps([[measure(case, rank) for rank in case["ranks"]] for case in cases]))


if __name__ == "__main__":
    main()
