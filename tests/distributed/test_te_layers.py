"""TransformerEngine's layers and torch's hold the same parameters and save them under the same keys.

TransformerEngine does not install on a machine without CUDA, so a stand-in with the parameters of its modules (names
and shapes from its sources) takes its place in the child process. What this proves: with it, megatron-core's own
wrapper classes and spec provider, and this package's, build a policy with the parameters, shapes and checkpoint keys of
torch's layers, and a checkpoint with its optimizer goes from one to the other and back. What it does not: that
TransformerEngine's modules are as its sources say, and anything about what they compute. No kernel ran.
(Its attention tolerates a checkpoint without its state, as megatron-core's checkpoints are; so does the stand-in's.)
"""

import json
from pathlib import Path

import pytest
from actor_case import make_case
from launch_ranks import launch_ranks
from te_worker import LAYOUTS

STAND_IN = Path(__file__).parents[1] / "transformer_engine_stand_in"
WORKER = Path(__file__).with_name("te_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{layout: what each of the two ranks found}."""
    case, out = tmp_path_factory.mktemp("case"), tmp_path_factory.mktemp("out")
    make_case(case)
    launch_ranks(WORKER, case, out, log=out / "ranks.log", path=[STAND_IN])
    return {name: [json.loads((out / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in LAYOUTS}


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_and_checkpoint_keys_are_the_same(results, name):
    for found in results[name]:
        engine, torch = found["engine"], found["torch"]
        assert "TELayerNormColumnParallelLinear" in engine["classes"]
        assert "SegmentedCoreAttention" in engine["classes"]
        assert not any(name.startswith("TE") for name in torch["classes"])
        assert engine["parameters"] == torch["parameters"]
        assert engine["tensors"] == torch["tensors"]
        assert len(engine["tensors"]) >= len(engine["parameters"])
        # Only TransformerEngine's final norms have a state besides their weight, which loading therefore may lack.
        others = set(engine["objects"]) ^ set(torch["objects"])
        assert others
        assert all(key.endswith("final_layernorm._extra_state") for key in others)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_goes_from_one_to_the_other_and_back(results, name):
    assert [found["exchange"] for found in results[name]] == [
        {"moved": True, "same_weights": True, "same_update": True}
    ] * 2
