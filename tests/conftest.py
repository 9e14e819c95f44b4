"""Every test process may import torchvision, transformers and megatron-core after this."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from perl_megatron.runtime import torchvision_schema

torchvision_schema.install()
