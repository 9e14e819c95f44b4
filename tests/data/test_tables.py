import json
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_megatron.data import tables
from perl_megatron.data.tables import Row, columns, count_rows, rows, table_files
from perl_megatron.errors import UserError

VALUES = [
    {"id": "a", "images": [{"bytes": b"\x89PNG", "path": None}], "answer": "7", "note": None},
    {"id": "b", "images": [], "answer": "1, 2", "note": "ü"},
    {"id": "c", "images": [{"bytes": b"", "path": "c.png"}], "answer": "B", "note": None},
]
PLAIN = [{"id": "a", "n": 12, "list": [1, {"x": None}]}, {"id": 'ü\n"b'}, {"id": "c", "n": -1.5e3}]


def write_parquet(path: Path, values=VALUES, **options) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path, **options)
    return path


def test_rows_of_parquet_files_keep_bytes_and_nesting(tmp_path):
    path = write_parquet(tmp_path / "train.parquet", row_group_size=2)
    assert list(rows(path)) == [Row(f"{path}:{number}", values) for number, values in enumerate(VALUES, 1)]
    assert columns(path) == ["id", "images", "answer", "note"]
    write_parquet(tmp_path / "more.parquet")
    assert count_rows(tmp_path) == 6
    (tmp_path / "a.jsonl").write_text("{}")
    assert count_rows(tmp_path / "a.jsonl") is None


def test_memory_is_bounded_by_pages_and_batches_and_not_by_row_groups(tmp_path, monkeypatch):
    content = [{"id": str(n), "image": bytes([n]) * 100_000} for n in range(100)]
    path = write_parquet(
        tmp_path / "large.parquet", content, row_group_size=100, write_batch_size=4, compression="none"
    )
    monkeypatch.setattr(tables, "BATCH_BYTES", 400_000)
    before, peak = pyarrow.total_allocated_bytes(), 0
    for number, row in enumerate(rows(path)):
        assert row.values == content[number]
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    assert number == 99
    assert peak < 5_000_000 < path.stat().st_size


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_files_of_saved_datasets(tmp_path, kind):
    table = pyarrow.Table.from_pylist(VALUES)
    path = tmp_path / "data-00000-of-00001.arrow"
    new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    (tmp_path / "state.json").write_text("{}")
    assert [row.values for row in rows(tmp_path)] == VALUES
    assert columns(tmp_path) == ["id", "images", "answer", "note"]


def test_a_json_file_holds_a_list_or_lines(tmp_path):
    as_list, as_lines = tmp_path / "list.json", tmp_path / "lines.json"
    as_list.write_text("﻿ " + json.dumps(PLAIN, indent=3))
    as_lines.write_text("﻿" + "\n\n".join(map(json.dumps, PLAIN)))
    assert [row.values for row in rows(as_list)] == [row.values for row in rows(as_lines)] == PLAIN
    assert [row.where for row in rows(as_list)] == [f"{as_list}:{n}" for n in (1, 2, 3)]
    assert [row.where for row in rows(as_lines)] == [f"{as_lines}:{n}" for n in (1, 3, 5)]  # the file's lines
    as_list.write_text("[]")
    assert list(rows(as_list)) == [] == columns(as_list)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / ".cache").mkdir()
    for name in ("b.jsonl", "a.jsonl", "more/0.jsonl", ".hidden.jsonl", ".cache/x.jsonl"):
        (tmp_path / name).write_text(json.dumps({"name": name}))
    (tmp_path / "dataset_info.json").write_text("{}")
    assert [row.values["name"] for row in rows(tmp_path)] == ["a.jsonl", "b.jsonl", "more/0.jsonl"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "x,y"),
        ("a.parquet", "PAR1 and nothing"),
        ("a.arrow", "nothing"),
        ("a.json", '[{"id": 1}, {"id"'),
        ("a.json", '[{"id": 1} {"id": 2}]'),
        ("a.json", '[{"id": 1}] and more'),
        ("a.json", "[7]"),
        ("a.json", '[{"id": "' + "ÿ" + '"}]'),
        ("a.jsonl", '{"id": 1}\n{"id"'),
        ("a.jsonl", "7"),
        ("a.jsonl", "[" * 100_000),
    ],
)
def test_what_is_no_table_is_refused_with_its_place(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UserError) as refusal:
        list(rows(path))
    assert refusal.value.where is not None
    assert refusal.value.where.startswith(str(path))
    assert refusal.value.fix


def test_a_truncated_parquet_file_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot read the table"):
        list(rows(path))


def test_missing_paths_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        table_files(tmp_path / "none")
    with pytest.raises(UserError, match="no table"):
        table_files(tmp_path)


def test_broken_rows_can_be_reported_instead(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id"\n[]\n\xff\n{"id": 2}')
    reported: list[str] = []
    kept = list(rows(path, on_broken=lambda where, reason: reported.append(where)))
    assert [row.values["id"] for row in kept] == [1, 2]
    assert reported == [f"{path}:{n}" for n in (2, 3, 4)]


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 100)
    for name, content in [("a.jsonl", '{"id": "' + "x" * 200), ("a.json", '[{"id": "' + "x" * 200)]:
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError):
            list(rows(tmp_path / name))


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=20))
ELEMENTS = st.lists(
    st.dictionaries(st.text(max_size=5), SCALARS | st.lists(SCALARS, max_size=3), max_size=4), max_size=6
)


@given(elements=ELEMENTS, indent=st.sampled_from([None, 0, 2]), buffer=st.integers(1, 40), ascii=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_list_is_decoded_the_same_through_any_window(tmp_path_factory, elements, indent, buffer, ascii):
    path = tmp_path_factory.mktemp("window") / "list.json"
    path.write_text(json.dumps(elements, indent=indent, ensure_ascii=ascii), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "BUFFER_BYTES", buffer)
        assert [row.values for row in rows(path)] == elements
