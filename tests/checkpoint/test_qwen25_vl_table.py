import dataclasses

import pytest
import torch
from tiny_policy import hf_config

from perl_megatron.checkpoint.qwen25_vl_table import canonical_megatron_name, published_name, table
from perl_megatron.model.architecture import read_architecture


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def config(request):
    return hf_config(tied=request.param)


def test_names_are_exactly_those_of_transformers(config, tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    theirs = sorted(published_name(name) for name, _ in model.named_parameters())
    ours = sorted(name for entry in table(read_architecture(tmp_path)) for name in entry.published)
    assert ours == theirs


def test_every_layer_of_the_published_sizes_is_listed(config, tmp_path):
    config.save_pretrained(tmp_path)
    architecture = dataclasses.replace(read_architecture(tmp_path), num_layers=80)
    assert sum(entry.megatron.endswith("mlp.linear_fc2.weight") for entry in table(architecture)) == 80 + 3


def test_both_naming_schemes_mean_the_same():
    assert published_name("model.language_model.layers.3.mlp.up_proj.weight") == "model.layers.3.mlp.up_proj.weight"
    assert published_name("model.visual.blocks.0.norm1.weight") == "visual.blocks.0.norm1.weight"
    assert published_name("model.layers.3.mlp.up_proj.weight") == "model.layers.3.mlp.up_proj.weight"
    assert published_name("lm_head.weight") == "lm_head.weight"


def test_names_of_fused_norms():
    layer = "language_model.decoder.layers.3."
    assert (
        canonical_megatron_name(f"{layer}self_attention.linear_qkv.layer_norm_weight")
        == f"{layer}input_layernorm.weight"
    )
    assert canonical_megatron_name(f"{layer}mlp.linear_fc1.layer_norm_weight") == f"{layer}pre_mlp_layernorm.weight"
    assert canonical_megatron_name(f"{layer}mlp.linear_fc1.weight") == f"{layer}mlp.linear_fc1.weight"
