import json

import pytest
from tiny_policy import hf_config

from perl_megatron.config.architecture import read_architecture_numbers
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import read_architecture

PUBLISHED_3B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}


def write(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_published_flat_layout(tmp_path):
    architecture = read_architecture(write(tmp_path, PUBLISHED_3B))
    assert architecture.num_layers == 36
    assert architecture.head_dim == 128
    assert architecture.mrope_section == (16, 24, 24)
    assert architecture.rope_theta == 1e6
    assert architecture.norm_epsilon == 1e-6
    assert architecture.tied_embeddings
    assert architecture.vision.full_attention_blocks == (7, 15, 23, 31)
    assert architecture.vision.cells_per_window == 4
    assert architecture.vision.patch_values == 1176


SPARSE_VISION = {"intermediate_size": 3420, "num_heads": 16, "hidden_size": 1280, "out_hidden_size": 2048}
"""Leaves the rest to the defaults."""


@pytest.mark.parametrize("change", [{}, {"head_dim": 96}, {"vision_config": SPARSE_VISION}])
def test_a_login_node_reads_the_same_numbers(tmp_path, change):
    folder = write(tmp_path, PUBLISHED_3B | change)
    assert read_architecture_numbers(folder) == read_architecture(folder).numbers


@pytest.mark.parametrize("head_dim", [None, 96])
def test_a_login_node_reads_the_same_numbers_from_the_nested_layout(tmp_path, head_dim):
    hf_config(tied=True).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["text_config"]["head_dim"] = head_dim
    write(tmp_path, content)
    assert read_architecture_numbers(tmp_path) == read_architecture(tmp_path).numbers


@pytest.mark.parametrize("tied", [False, True])
def test_nested_layout(tmp_path, tied):
    hf_config(tied=tied).save_pretrained(tmp_path)
    architecture = read_architecture(tmp_path)
    assert (architecture.num_layers, architecture.num_kv_heads, architecture.vision.depth) == (4, 4, 3)
    assert architecture.tied_embeddings is tied
    assert architecture.padded_vocabulary(2) == 332


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_vl"}, "'qwen2_vl'"),
        ({"hidden_act": "gelu"}, "text hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "default"}}, "mrope_section"),
    ],
)
def test_what_is_not_computed_exactly_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        read_architecture(write(tmp_path, PUBLISHED_3B | change))


def test_missing_and_broken_configs_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"(?s)cannot read.*config\.json"):
        read_architecture(tmp_path)
