"""Training states go from torch's layers and optimizer to TransformerEngine's and back; the vision tower runs there.

TransformerEngine does not install on a machine without CUDA, so a stand-in with the parameters of its modules and the
state of its FusedAdam (names, shapes and forms from its sources) takes its place in one of three processes: one with
torch alone writes a checkpoint, one with the stand-in carries it on, one with torch alone takes that up. What this
shows: with the stand-in, megatron-core's own wrapper classes, spec provider and optimizer, and this package's, build a
policy with the parameters, shapes and checkpoint keys of torch's layers; a training state survives the way there and
back; FusedAdam's form of state takes the update that torch's takes; and this package calls TransformerEngine's
attention with the vision tower's segments, and with shared prompts and their responses, in the way that megatron-core's
wrapper asks for.
What it does not: that TransformerEngine is as its sources say, and what it computes. The stand-in is not
TransformerEngine: its layers are plain torch and run forward only, and its optimizer is AdamW in plain torch. No kernel
ran.
(Its attention tolerates a checkpoint without its state, as megatron-core's checkpoints are; so does the stand-in's.)
"""

import json
from pathlib import Path

import numpy as np
import pytest
from actor_case import make_case, make_sequences
from actor_yardstick import expect
from launch_ranks import launch_ranks
from te_worker import LAYOUTS, PHASES

from perl_megatron.verification.judge import FLOOR, MULTIPLE

STAND_IN = Path(__file__).parents[1] / "transformer_engine_stand_in"
WORKER = Path(__file__).with_name("te_worker.py")
EPS = float(np.finfo(np.float32).eps)
FULL_BLOCKS = (1, 3)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    case = tmp_path_factory.mktemp("case")
    make_case(case, vision_depth=4)
    return case


@pytest.fixture(scope="module")
def out(case, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    for phase in PHASES:
        path = [STAND_IN] if phase == "carry" else []
        launch_ranks(WORKER, case, out, phase, log=out / f"{phase}.log", path=path)
    return out


@pytest.fixture
def found(out, request):
    """{phase: what each of the two ranks found}."""
    name = request.node.callspec.params["name"]
    return {
        phase: [json.loads((out / f"{name}-{phase}-{rank}.json").read_text()) for rank in (0, 1)] for phase in PHASES
    }


@pytest.fixture(scope="module")
def expected(case):
    return expect(case, make_sequences)


def weights(out, name, kept):
    return dict(np.load(out / name / f"{kept}.npz"))


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_and_checkpoint_keys_are_the_same(found, name):
    for torch_found, engine_found in zip(found["write"], found["carry"], strict=True):
        torch, engine = torch_found["described"], engine_found["described"]
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
def test_a_training_state_goes_there_and_back_bit_for_bit(out, found, name):
    first, second = weights(out, name, "torch-1"), weights(out, name, "torch-2")
    assert all(not np.array_equal(first[key], second[key]) for key in first)
    assert same(weights(out, name, "engine-1"), first)
    assert same(weights(out, name, "back-2"), second)
    for torch_found, back in zip(found["write"], found["return"], strict=True):
        assert back["second"] == torch_found["trajectory"][1]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("step", "kept"), [(2, "engine-2"), (3, "back-3")])
def test_the_fused_optimizers_state_takes_the_same_updates(out, found, name, step, kept):
    """The second update by FusedAdam after torch's first, the third by torch's AdamW after that."""
    assert all(ranks["optimizer"] == "FusedAdam" for ranks in found["carry"])
    before, after, actual = (weights(out, name, each) for each in (f"torch-{step - 1}", f"torch-{step}", kept))
    for key in before:
        # Of the weights one last place for each update; of the update some ten operations in float32.
        moved = np.linalg.norm(after[key].astype(np.float64) - before[key])
        last_places = np.linalg.norm(np.spacing(np.abs(after[key])))
        limit = step * last_places + 16 * EPS * moved
        assert limit < 0.05 * moved, "a count of steps that is off by one changes these updates by a fifth"
        assert np.linalg.norm(actual[key].astype(np.float64) - after[key]) <= limit, key


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_vision_tower_calls_the_attention_with_its_segments(found, name):
    seen = [ranks["vision"] for ranks in found["carry"] if "vision" in ranks]
    assert len(seen) == (1 if name == "pipeline" else 2)
    windows = []
    for vision in seen:
        assert len(vision["calls"]) == 4
        for block, call in enumerate(vision["calls"]):
            assert call["qkv_format"] == "thd"
            assert call["attn_mask_type"] == "padding"
            assert call["attention_mask"] is None
            shapes = [call[part]["value"] for part in ("query", "key", "value")]
            assert all(len(shape) == 3 and shape[0] == vision["patches"] for shape in shapes)
            ends = call["cu_seqlens_q"]["value"]
            assert call["cu_seqlens_q"] == call["cu_seqlens_kv"]
            assert call["cu_seqlens_q"]["dtype"] == "torch.int32"
            assert (ends[0], ends[-1]) == (0, vision["patches"])
            lengths = np.diff(ends)
            assert lengths.min() > 0
            assert call["max_seqlen_q"] == call["max_seqlen_kv"] == lengths.max()
            images = len(vision["calls"][FULL_BLOCKS[0]]["cu_seqlens_q"]["value"]) - 1
            assert len(lengths) == images if block in FULL_BLOCKS else len(lengths) >= images
            windows.append(len(lengths) - images)
    assert max(windows) > 0, "an image of several windows; where ranks share the images, one may have only small ones"


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_vision_towers_features_are_those_of_torchs_layers(found, name):
    """With the stand-in's plain torch in TransformerEngine's place, to float32 rounding."""
    for ranks in found["carry"]:
        if "vision" in ranks:
            assert ranks["vision"]["error"] <= MULTIPLE * ranks["vision"]["torch_error"] + FLOOR * EPS


@pytest.mark.parametrize("name", ["data", "tensor"])
def test_the_language_model_calls_the_attention_for_prompts_and_then_for_responses(found, name, expected):
    """With the stand-in's plain torch in TransformerEngine's place, log-probabilities to float32 rounding."""
    for ranks in found["carry"]:
        language = ranks["language"]
        for calls in language["calls"]:
            assert len(calls) % 2 == 0
            for prompts, responses in zip(calls[::2], calls[1::2], strict=True):
                assert prompts["qkv_format"] == responses["qkv_format"] == "thd"
                assert prompts["attn_mask_type"] == "padding_causal"
                assert prompts["cu_seqlens_q"] == prompts["cu_seqlens_kv"]
                assert set(np.diff(prompts["cu_seqlens_q"]["value"])) <= set(language["prompts"])
                assert responses["attn_mask_type"] == "padding_causal_bottom_right"
                queries, keys = (np.diff(responses[f"cu_seqlens_{side}"]["value"]) for side in ("q", "kv"))
                assert set(keys - queries) <= set(language["prompts"])
                assert (responses["max_seqlen_q"], responses["max_seqlen_kv"]) == (queries.max(), keys.max())
                assert responses["cu_seqlens_kv"]["dtype"] == "torch.int32"
        expected.check_log_probs(np.array(language["log_probs"]))
