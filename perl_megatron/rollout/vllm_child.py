"""What vLLM's own processes import first: see ``prepare_children``. Importing it makes ready for torchvision."""

from __future__ import annotations

import importlib.util
import sys

from perl_megatron.runtime import environment, platform

environment.prepare_process()
platform.install()


def prepare_children() -> None:
    """Let processes that this one spawns import this file first, before they unpickle anything of vLLM's.

    A spawned process imports the main module of its parent; ours has nothing to import there, and without
    ``platform.install`` torchvision cannot be imported beside a CPU torch.
    """
    sys.modules["__main__"].__spec__ = importlib.util.find_spec(__name__)
