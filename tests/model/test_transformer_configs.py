import pytest
from tiny_policy import hf_config

from perl_megatron.config.schema import ModelConfig, ParallelConfig
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import read_architecture
from perl_megatron.model.transformer_configs import language_config, refuse_silent_traps


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
