"""Every test process may import torchvision, transformers and megatron-core after this, quickly."""

import gc
import os
import sys
from pathlib import Path

# To compile what a process imports from torch, transformers and megatron-core takes ten of its seventeen seconds, and
# the installer leaves that out. So the first process of all tests does it for the others; also where the environment
# wants no bytecode beside the sources, as this is in another folder, which `make clean` removes.
BYTECODE = Path(__file__).parents[1] / "build" / "bytecode"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
sys.pycache_prefix = os.environ.setdefault("PYTHONPYCACHEPREFIX", str(BYTECODE))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads that wait for each other's next piece of work would keep the cores that another process's need.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

gc.disable()  # until all is imported: see perl_megatron/runtime/garbage.py
from perl_megatron.runtime import garbage, torchvision_schema  # noqa: E402

torchvision_schema.install()


def pytest_collection_finish():
    """What the tests import stays to the end of the run."""
    garbage.stay()
    gc.enable()
