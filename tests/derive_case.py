"""A tiny architecture and configs of it, for tests of what follows from a config."""

from perl_megatron.config.architecture import ArchitectureNumbers
from perl_megatron.config.load import load_config

TINY = ArchitectureNumbers(
    num_layers=4,
    hidden_size=128,
    ffn_size=336,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocabulary_size=1000,
    vision_depth=4,
    vision_hidden_size=64,
    vision_ffn_size=172,
    vision_num_heads=4,
    vision_out_hidden_size=128,
    vision_patch_values=1176,
    vision_merge_size=2,
    vision_window_patches=64,
    vision_full_attention_blocks=(3,),
)


def config_of(*overrides):
    return load_config(None, ["model.path=m", "rollout.engine=embedded", *overrides]).config
