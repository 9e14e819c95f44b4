import json
import os
import tracemalloc
from pathlib import Path

import pytest
from pool_functions import check

from perl_megatron.data.record_files import RecordFiles, open_record_files, record_files
from perl_megatron.data.records import read_records
from perl_megatron.errors import UserError


def write(path: Path, ids, **changes) -> Path:
    lines = [{"id": str(each), "images": [], "text": f"{each}?", "answer": "7"} | changes for each in ids]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def opened(*paths: Path, max_corrupt_fraction: float = 0.0) -> RecordFiles:
    return open_record_files(paths, check=check, num_processes=1, max_corrupt_fraction=max_corrupt_fraction)


def test_files_are_a_sequence_of_what_read_records_reads(tmp_path):
    first, second = write(tmp_path / "a.jsonl", range(5)), write(tmp_path / "b.jsonl", range(5, 8))
    records = opened(first, second)
    whole = [
        *read_records(first, max_corrupt_fraction=0).records,
        *read_records(second, max_corrupt_fraction=0).records,
    ]
    assert list(records) == whole
    assert [records[index] for index in range(-8, 8)] == whole * 2
    assert records[3:6] == whole[3:6]
    assert (len(records), records.sizes) == (8, (5, 3))
    for outside in (8, -9):
        with pytest.raises(IndexError):
            records[outside]


def test_ids_used_before_are_dropped_in_the_same_and_in_another_file(tmp_path):
    first, second = write(tmp_path / "a.jsonl", [1, 2, 1]), write(tmp_path / "b.jsonl", [3, 2, 4])
    records = opened(first, second, max_corrupt_fraction=0.34)
    assert [record.id for record in records] == ["1", "2", "3", "4"]
    assert [str(dropped) for dropped in records.dropped] == [
        f"{first}:3 (1): the id is used before, by {first}:1",
        f"{second}:2 (2): the id is used before, by {first}:2",
    ]
    with pytest.raises(UserError, match="2 of 6 records cannot be used"):
        opened(first, second, max_corrupt_fraction=0.33)


def test_equal_hashes_of_different_ids_are_no_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr("perl_megatron.data.record_index.id_hash", len)
    records = opened(write(tmp_path / "a.jsonl", [1, 2, 30, 3, 2]), max_corrupt_fraction=0.2)
    assert [record.id for record in records] == ["1", "2", "30", "3"]


def test_what_is_known_without_reading_the_records(tmp_path):
    plain = write(tmp_path / "a.jsonl", [1], demonstration="7")
    pictured = write(tmp_path / "b.jsonl", [2, 3], images=["x.png"] * 3, text="<image><image><image>")
    records = opened(plain, pictured)
    assert records.max_images == 3
    assert [record.id for record in records.with_demonstration()] == ["1"]
    assert records.with_demonstration().sizes == (1, 0)


def test_a_file_that_changes_in_use_is_not_read_on(tmp_path):
    path = write(tmp_path / "a.jsonl", range(3))
    records = opened(path)
    assert records[2].id == "2"
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="changed while"):
        records[2]


def test_empty_and_wholly_bad_files_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"(?s)is empty.*empty\.jsonl"):
        opened(write(tmp_path / "a.jsonl", [1]), tmp_path / "empty.jsonl")
    (tmp_path / "bad.jsonl").write_text("{\n{")
    with pytest.raises(UserError, match="2 of 2 records"):
        opened(tmp_path / "bad.jsonl", max_corrupt_fraction=1)


def test_paths_of_a_config(tmp_path):
    (tmp_path / "imported").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half/records.jsonl.part").touch()
    inside, outside = write(tmp_path / "imported/records.jsonl", [1]), write(tmp_path / "a.jsonl", [2])
    assert record_files([tmp_path / "imported", outside], key="data.train") == (inside, outside)
    (tmp_path / "x.parquet").touch()
    for path, reason in [
        ("x.parquet", r"(?s)is a table.*import_dataset\.py .*x\.parquet"),
        ("half", "is not finished"),
        (".", r"(?s)has no records\.jsonl.*import_dataset\.py"),
        ("none.jsonl", "does not exist"),
    ]:
        with pytest.raises(UserError, match=reason) as refusal:
            record_files([tmp_path / path], key="data.train")
        assert refusal.value.where == "data.train"


def test_an_open_dataset_takes_few_bytes_for_each_record(tmp_path):
    num_records = 20_000
    path = write(tmp_path / "a.jsonl", range(num_records), kind="x" * 1000)
    opened(path)
    tracemalloc.start()
    records = opened(path)
    held, peak = tracemalloc.get_traced_memory()
    indices = range(0, num_records, 7)
    for index in indices:
        assert records[index].id == str(index)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 50 * num_records
    assert peak < 200 * num_records
    assert grown - held < 100 * len(indices)  # a record itself has more than 1000
    assert path.stat().st_size > 1000 * num_records


def test_files_are_closed_with_the_dataset(tmp_path):
    path = write(tmp_path / "a.jsonl", [1])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert len(opened(path)) == 1
    assert len(os.listdir("/proc/self/fd")) == before


def test_sources_are_told_apart_by_where_their_records_came_from(tmp_path):
    records = opened(write(tmp_path / "a.jsonl", [1]), write(tmp_path / "b.jsonl", [2]))
    assert [record.source for record in records] == [f"{tmp_path / 'a.jsonl'}:1", f"{tmp_path / 'b.jsonl'}:1"]
