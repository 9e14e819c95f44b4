"""What ranks import, loaded once for all that are forked from here: see ``warm_torchrun.py``."""

from perl_megatron.runtime import garbage

with garbage.paused():
    import torch.distributed.run  # noqa: F401

    from perl_megatron.runtime import platform

    platform.install()
    from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: F401

    from perl_megatron.train import actor  # noqa: F401
    from perl_megatron.verification import command  # noqa: F401
