"""One rank of a job whose libraries are loaded already (``warm_torchrun.py``): job_rank.py train CONFIG OVERRIDE…"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from perl_megatron import cli

if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[2])
    sys.exit(cli.main(sys.argv[1:]))
