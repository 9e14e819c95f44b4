"""The plan's activations are what autograd really saves of a micro-batch, read off with hooks. One process, float32."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from perl_megatron.batching.cost import CostModel
from perl_megatron.batching.work import ViewWork
from perl_megatron.config.load import load_config
from perl_megatron.config.schema import ParallelConfig
from perl_megatron.model.architecture import read_architecture
from perl_megatron.model.policy import build_policy
from perl_megatron.plan.activations import activations
from perl_megatron.plan.workload import size_of
from perl_megatron.runtime import topology as layout
from perl_megatron.train.batch import TrainingSequence
from perl_megatron.train.grid import lay_out_rows
from perl_megatron.train.packed import lay_out_packed
from perl_megatron.types import EncodedPrompt

SMALL = Path(__file__).parents[2] / "benchmarks" / "small_model" / "config.json"
CELLS, WORDS, RESPONSE, RESPONSES = 60, 41, 37, 3


@pytest.fixture(scope="module")
def topology():
    yield layout.initialize(ParallelConfig(), seed=0, timeout_seconds=60)
    layout.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The small policy with more layers, as a layer's part is what is to be seen."""
    content = json.loads(SMALL.read_text()) | {"num_hidden_layers": 6}
    content["vision_config"] |= {"depth": 4, "fullatt_block_indexes": [0, 1, 2, 3]}
    folder = tmp_path_factory.mktemp("policy")
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def make_batch(sharing):
    """A prompt with one image, and its responses."""
    tokens = np.arange(10, 10 + WORDS + CELLS)
    prompt = EncodedPrompt(
        token_ids=tokens,
        compact_ids=(),
        image_starts=(5,),
        grids=np.array([[1, 2, 2 * CELLS]]),
        image_keys=("image",),
    )
    sequences = [TrainingSequence(prompt, np.arange(RESPONSE)) for _ in range(RESPONSES)]
    how = {"length_multiple": 1, "pad_token_id": 0, "patches": lambda key: np.ones((4 * CELLS, 1176), np.float32)}
    lay_out = lay_out_packed if sharing == "full" else lay_out_rows
    return lay_out(sequences, range(RESPONSES), device=torch.device("cpu"), **how)


def saved_bytes(modules, batch):
    """Of all tensors that the forward pass keeps, each piece of memory once, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for module in modules for parameter in module.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        modules[0](batch.token_ids, batch.position_ids, batch.vision, batch.output_places, batch.shared_prompts)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("sharing", ["full", "vision"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_what_autograd_keeps(topology, folder, sharing, recompute):
    settings = ("model.dtype=float32", f"model.recompute={recompute}", f"actor.sharing={sharing}")
    config = load_config(None, [f"model.path={folder}", "rollout.engine=embedded", *settings]).config
    architecture = read_architecture(folder)
    modules = build_policy(architecture, config.model, config.parallel, topology)
    for parameter in modules[0].parameters():
        parameter.data.normal_(0, 0.05)
    numbers = architecture.numbers
    view = ViewWork(tuple(range(RESPONSES)), WORDS + CELLS, (RESPONSE,) * RESPONSES, (("image", 4 * CELLS),))
    size = size_of([view], CostModel(numbers, sharing))
    plan = activations(config, numbers, size, "torch")
    planned = numbers.num_layers * plan.layer + plan.vision + plan.head
    # The hidden states of the outputs are kept by the loss, which does not run here.
    planned -= 4 * size.outputs * numbers.hidden_size
    assert planned == pytest.approx(saved_bytes(modules, make_batch(sharing)), rel=0.03)
