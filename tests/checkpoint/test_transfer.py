import torch

from perl_megatron.checkpoint.ops import Column, Replicated
from perl_megatron.checkpoint.qwen25_vl_table import Entry
from perl_megatron.checkpoint.transfer import Shard, cut


def test_parts_hold_at_most_so_many_bytes_of_all_ranks():
    sizes = {"a": 10, "b": 30, "c": 1, "d": 500, "e": 39, "f": 1}
    entries = [Entry(name, (name,), Replicated() if name in "ce" else Column()) for name in sizes]
    shards = {name: Shard(0, torch.Size([size]), torch.bfloat16) for name, size in sizes.items()}

    def parts(ranks, num_bytes):
        return ["".join(entry.megatron for entry in part) for part in cut(entries, shards, ranks, num_bytes)]

    assert parts(1, 82) == ["abc", "d", "ef"]
    assert parts(2, 162) == ["abc", "d", "ef"]
    assert parts(2, 160) == ["ab", "c", "d", "ef"]
    assert parts(1, 1) == list("abcdef")
    assert parts(1, 1 << 30) == ["abcdef"]
