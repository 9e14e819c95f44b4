"""What ranks import, loaded once for all that are forked from here: see ``warm_torchrun.py``."""

from perl_megatron.runtime import environment, garbage

environment.prepare_process()

with garbage.paused():
    import torch.distributed.run  # noqa: F401

    from perl_megatron.runtime import platform

    platform.install()

    # What a run's end draws its curves with, and what transformers loads where a policy's folder asks for it.
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import transformers.models.auto.image_processing_auto
    import transformers.models.auto.tokenization_auto
    import transformers.models.qwen2.tokenization_qwen2
    import transformers.models.qwen2_5_vl.configuration_qwen2_5_vl
    import transformers.models.qwen2_vl.image_processing_qwen2_vl  # noqa: F401
    from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: F401

    from perl_megatron import jobs  # noqa: F401
    from perl_megatron.rollout import embedded  # noqa: F401
    from perl_megatron.train import actor  # noqa: F401
    from perl_megatron.verification import command  # noqa: F401
