import pytest
from tiny_policy import hf_config

from perl_megatron.config.schema import ModelConfig, ParallelConfig
from perl_megatron.errors import UserError
from perl_megatron.model import transformer_configs
from perl_megatron.model.architecture import read_architecture
from perl_megatron.model.transformer_configs import (
    fuses_weight_gradients,
    language_config,
    merger_config,
    refuse_silent_traps,
    vision_config,
)


@pytest.fixture
def config(tmp_path):
    hf_config(tied=False).save_pretrained(tmp_path)
    parallel = ParallelConfig(pipeline=2, virtual_pipeline=2)
    return language_config(read_architecture(tmp_path), ModelConfig(path=tmp_path, dtype="float32"), parallel)


@pytest.mark.parametrize(
    ("option", "value"), [("batch_p2p_comm", True), ("overlap_p2p_comm", False), ("deallocate_pipeline_outputs", True)]
)
def test_settings_that_compute_wrong_gradients_in_silence_are_refused(config, option, value):
    refuse_silent_traps(config)
    setattr(config, option, value)
    with pytest.raises(UserError, match=option):
        refuse_silent_traps(config)


@pytest.mark.parametrize(
    ("cuda", "apex", "transformer_engine", "language", "images"),
    [
        (False, False, False, True, True),
        (True, False, False, False, False),
        (True, True, False, True, True),
        (True, False, True, False, True),
        (True, True, True, True, True),
    ],
)
def test_weight_gradients_are_fused_where_every_layer_of_a_part_has_a_kernel(
    cuda, apex, transformer_engine, language, images
):
    facts = {"cuda": cuda, "apex": apex, "transformer_engine": transformer_engine}
    assert fuses_weight_gradients(**facts, has_megatron_linear=True) == language
    assert fuses_weight_gradients(**facts, has_megatron_linear=False) == images


def test_fp8_is_the_language_models_and_needs_cuda(tmp_path, monkeypatch):
    hf_config(tied=False).save_pretrained(tmp_path)
    architecture = read_architecture(tmp_path)
    arguments = architecture, ModelConfig(path=tmp_path, fp8="hybrid", fp8_recipe="tensorwise"), ParallelConfig()
    monkeypatch.setattr(transformer_configs.platform, "is_cuda", lambda: False)
    with pytest.raises(UserError, match="no CUDA"):
        language_config(*arguments)
    monkeypatch.setattr(transformer_configs.platform, "is_cuda", lambda: True)
    monkeypatch.setattr(transformer_configs.platform, "compute_capability", lambda: (8, 0))
    with pytest.raises(UserError, match=r"compute capability 8\.9, and this one's is 8\.0"):
        language_config(*arguments)
    monkeypatch.setattr(transformer_configs.platform, "compute_capability", lambda: (8, 9))
    config = language_config(*arguments)
    assert (config.fp8, config.fp8_recipe) == ("hybrid", "tensorwise")
    assert vision_config(*arguments).fp8 is None
    assert merger_config(*arguments).fp8 is None
