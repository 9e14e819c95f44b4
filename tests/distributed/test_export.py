"""The stream of weights over tensor- and pipeline-parallel ranks: whole, within its memory, and overlapping its use."""

import json
from pathlib import Path

import pytest
import transformers
from launch_ranks import launch_ranks
from tiny_policy import hf_config

WORKER = Path(__file__).with_name("export_worker.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    config = hf_config(tied=False)
    config.vision_config.hidden_size = 160  # so that the largest weight is a small part of all
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder / "policy")
    launch_ranks(WORKER, folder / "policy", folder / "out.json", log=folder / "log", processes=4)
    return {int(bucket): result for bucket, result in json.loads((folder / "out.json").read_text()).items()}


LARGEST = 1_638_400
"""Bytes of the tiny policy's largest weight."""


def test_every_rank_gets_every_tensor(found):
    assert [whole for whole, *_ in found.values()] == [True] * 3


def test_memory_is_that_of_two_buckets(found):
    """A bucket holds the largest weight twice at least. In one large bucket, everything is there at once."""
    few, more, all_at_once = (peak for _, peak, *_ in found.values())
    assert LARGEST < few <= 2 * 2 * LARGEST
    assert LARGEST < more <= 2 * 4_000_000
    assert all_at_once > 2 * 2 * LARGEST


def test_tensors_are_used_while_others_are_on_their_way(found):
    assert [used > 30 for _, _, used, _ in found.values()] == [True, True, False]
    assert [left for *_, left in found.values()] == [0, 0, 0]
