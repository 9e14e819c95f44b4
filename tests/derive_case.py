"""A tiny architecture and configs of it, for tests of what follows from a config."""

from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.config.load import load_config

TINY = ArchitectureNumbers(
    num_layers=4,
    hidden_size=128,
    ffn_size=336,
    num_heads=4,
    num_kv_heads=2,
    vocabulary_size=1000,
    vision_ffn_size=172,
    vision_num_heads=4,
)


def config_of(*overrides):
    return load_config(None, ["model.path=m", "rollout.engine=embedded", *overrides]).config
