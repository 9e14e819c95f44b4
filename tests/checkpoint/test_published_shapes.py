import pytest
import torch
from tiny_policy import hf_config

from perl_megatron.checkpoint.published_shapes import published_shapes
from perl_megatron.checkpoint.qwen25_vl_table import published_name, table
from perl_megatron.model.architecture import read_architecture


@pytest.mark.parametrize("tied", [True, False])
def test_shapes_are_those_of_transformers(tmp_path, tied):
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = hf_config(tied=tied)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    theirs = {published_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    architecture = read_architecture(tmp_path)
    ours = published_shapes(architecture)
    assert ours == theirs
    assert ("lm_head.weight" in ours) == (not tied)
    assert set(ours) == {name for entry in table(architecture) for name in entry.published}
