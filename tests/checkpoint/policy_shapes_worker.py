"""Names and shapes of policies' parameters, as JSON: `policy_shapes_worker.py FOLDER,TENSOR,PIPELINE …`.

One process stands in for the first tensor rank of every stage: the group is torch's fake one, in which nothing is sent,
and the parameters are on the meta device.
"""

import json
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from perl_megatron.runtime import platform

platform.install()

from megatron.core import parallel_state  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from perl_megatron.checkpoint.qwen25_vl_table import canonical_megatron_name  # noqa: E402
from perl_megatron.config.schema import ModelConfig, ParallelConfig  # noqa: E402
from perl_megatron.model.architecture import read_architecture  # noqa: E402
from perl_megatron.model.policy import Policy  # noqa: E402
from perl_megatron.runtime.topology import Topology  # noqa: E402


def shapes_of_policy(folder: Path, tensor: int, pipeline: int) -> dict[str, list[int]]:
    architecture, parallel = read_architecture(folder), ParallelConfig(tensor=tensor, pipeline=pipeline)
    shapes = {}
    for stage in range(pipeline):
        rank, world_size = stage * tensor, tensor * pipeline
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        parallel_state.initialize_model_parallel(tensor, pipeline, create_gloo_process_groups=False)
        place = Topology(rank, world_size, 0, tensor, stage, pipeline, data_rank=0, data_size=1)
        with torch.device("meta"):
            policy = Policy(architecture, ModelConfig(path=folder), parallel, place)
        first_layer = stage * architecture.num_layers // pipeline
        for name, parameter in policy.named_parameters():
            match = re.fullmatch(r"(language_model\.decoder\.layers\.)(\d+)(\..*)", name)
            whole = f"{match[1]}{first_layer + int(match[2])}{match[3]}" if match else name
            shapes[canonical_megatron_name(whole)] = list(parameter.shape)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return shapes


layouts = [argument.split(",") for argument in sys.argv[1:]]
print(json.dumps([shapes_of_policy(Path(folder), int(tensor), int(pipeline)) for folder, tensor, pipeline in layouts]))
