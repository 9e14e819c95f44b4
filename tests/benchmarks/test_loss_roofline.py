"""The calculated table: by hand at one size, and in the docs as it is now."""

import sys
from pathlib import Path

import pytest

from perl_megatron.kernels.triton_settings import ROWS_OF_SPLIT

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from loss_roofline import GPUS, table, work  # noqa: E402


def test_one_tile_by_hand():
    """T = 16, H = 8 and one split of rows."""
    needed = work(16, 8, ROWS_OF_SPLIT)
    assert needed.flops == 8 * 16 * 8 * ROWS_OF_SPLIT
    weight, states, logits = 2 * 8 * ROWS_OF_SPLIT, 2 * 8 * 16, 2 * 16 * ROWS_OF_SPLIT
    assert needed.bytes == (weight + states) + (2 * weight + 2 * states + 2 * 4 * 8 * 16 + 3 * logits) + 2 * weight
    assert needed.memory == logits + 4 * 8 * 16 + 4 * 8 * ROWS_OF_SPLIT
    arithmetic, traffic = needed.seconds(GPUS[0])
    assert arithmetic == pytest.approx(needed.flops / 312e12)
    assert traffic == pytest.approx(needed.bytes / 2.039e12)


def test_the_published_table_is_this_one():
    assert table(8192) in (ROOT / "docs" / "kernels.md").read_text()
