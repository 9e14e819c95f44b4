import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_functions import check

from perl_megatron.data import record_index
from perl_megatron.data.record_index import RecordIndex, cache_file, open_index
from perl_megatron.errors import UserError


def good(number: int, **changes) -> str:
    return json.dumps({"id": f"q{number}", "images": ["a.png"], "text": "<image>é?", "answer": "7"} | changes)


def opened(path: Path, num_processes: int = 1) -> RecordIndex:
    return open_index(path, check=check, num_processes=num_processes)


def test_entries_say_where_the_good_lines_are(tmp_path):
    path = tmp_path / "train.jsonl"
    lines = [good(0), "", "{", good(1, demonstration="7"), good(2, answer="refuse"), good(3, images=["a.png", "b.png"])]
    lines[5] = lines[5].replace("<image>", "<image><image>")
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    index = opened(path)
    content = path.read_bytes()
    found = [content[entry["offset"] :][: entry["length"]].decode().strip() for entry in index.entries]
    assert found == [lines[0], lines[3], lines[5]]
    assert index.entries["line"].tolist() == [1, 4, 6]
    assert index.entries["num_images"].tolist() == [1, 1, 2]
    assert index.entries["has_demonstration"].tolist() == [False, True, False]
    assert [(dropped.where, dropped.id) for dropped in index.dropped] == [(f"{path}:3", None), (f"{path}:5", "q2")]
    assert "refused" in index.dropped[1].reason


@given(st.lists(st.sampled_from(["", " ", "{", "good", "long"]), max_size=12), st.integers(1, 300), st.booleans())
@settings(max_examples=60, deadline=None)
def test_an_index_does_not_depend_on_how_the_file_is_cut(tmp_path_factory, kinds, chunk_bytes, ends):
    path = tmp_path_factory.mktemp("index") / "train.jsonl"
    texts = {"good": good, "long": lambda number: good(number, kind="x" * 200)}
    lines = [texts[kind](number) if kind in texts else kind for number, kind in enumerate(kinds)]
    path.write_text("\n".join(lines) + "\n" * ends)
    whole = opened(path)
    cache_file(path).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_index, "CHUNK_BYTES", chunk_bytes)
        cut = opened(path)
    np.testing.assert_array_equal(cut.entries, whole.entries)
    assert cut.dropped == whole.dropped
    assert len(whole.entries) + len(whole.dropped) == sum(bool(kind.strip()) for kind in kinds)


def test_processes_share_the_work_without_torch(tmp_path, monkeypatch):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([*map(good, range(300)), "{", good(300, answer="refuse")]))
    alone = opened(path)
    cache_file(path).unlink()
    monkeypatch.setattr(record_index, "CHUNK_BYTES", 2000)
    shared = opened(path, num_processes=2)
    np.testing.assert_array_equal(shared.entries, alone.entries)
    assert shared.dropped == alone.dropped
    assert len(shared.entries) == 300


def test_an_index_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([good(0), "{", good(1)]))
    first = opened(path)
    monkeypatch.setattr(record_index, "_make", None)  # would fail
    again = opened(path)
    np.testing.assert_array_equal(again.entries, first.entries)
    assert again.dropped == first.dropped
    assert sorted(os.listdir(tmp_path)) == [".train.jsonl.index", "train.jsonl"]
    monkeypatch.undo()

    path.write_text("\n".join([good(0), "{", good(2)]))
    os.utime(path, ns=(1, 1))
    assert len(opened(path).entries) == 2
    assert not np.array_equal(opened(path).entries, first.entries)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 and no more", None])
def test_a_damaged_index_is_made_again(tmp_path, damage):
    path = tmp_path / "train.jsonl"
    path.write_text(good(0))
    whole = opened(path)
    kept = cache_file(path).read_bytes()
    cache_file(path).write_bytes(kept[: len(kept) // 2] if damage is None else damage)
    np.testing.assert_array_equal(opened(path).entries, whole.entries)
    assert cache_file(path).read_bytes() == kept


def test_an_index_of_another_version_is_made_again(tmp_path, monkeypatch):
    path = tmp_path / "train.jsonl"
    path.write_text(good(0))
    opened(path)
    before = cache_file(path).read_bytes()
    monkeypatch.setattr(record_index, "_code_digest", lambda: "another version")
    opened(path)
    assert cache_file(path).read_bytes() != before


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path, monkeypatch, caplog):
    path = tmp_path / "train.jsonl"
    path.write_text(good(0))

    def read_only(source, target):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", read_only)
    assert len(opened(path).entries) == 1
    assert "Read-only file system" in caplog.text
    assert os.listdir(tmp_path) == ["train.jsonl"]


def test_what_cannot_be_read_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="No such file"):
        opened(tmp_path / "none.jsonl")
    (tmp_path / "one_line.jsonl").write_text("x" * 500)
    monkeypatch.setattr(record_index, "MAX_LINE_BYTES", 100)
    with pytest.raises(UserError, match="more than 100 bytes"):
        opened(tmp_path / "one_line.jsonl")
