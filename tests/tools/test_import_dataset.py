"""The tool as it is called."""

import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from random_checkpoint import TOOLS, tool

from perl_megatron.data.records import read_records

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c6360000000020001"
    "48afa4710000000049454e44ae426082"
)


def source(folder: Path, *answers: str | None) -> Path:
    rows = [{"images": [{"bytes": PNG, "path": None}], "problem": "<image>?", "answer": answer} for answer in answers]
    path = folder / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_the_command_imports_and_says_what_came_out(tmp_path):
    command = [
        sys.executable,
        str(TOOLS / "import_dataset.py"),
        str(source(tmp_path, "7", "8", "9")),
        str(tmp_path / "out"),
    ]
    for _ in range(2):  # the second call finds everything done
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert f"data.train={tmp_path / 'out'}" in result.stdout
        assert re.search(r"records +│ 3", result.stderr)
    records = read_records(tmp_path / "out/records.jsonl", max_corrupt_fraction=0).records
    assert [(record.id, record.answer) for record in records] == [
        ("train:1", "7"),
        ("train:2", "8"),
        ("train:3", "9"),
    ]
    assert len(list((tmp_path / "out/images").rglob("*.png"))) == 1


def test_many_dropped_rows_are_an_error(tmp_path, capsys):
    data = source(tmp_path, "7", None)
    assert tool("import_dataset").main([str(data), str(tmp_path / "out"), "--processes", "1"]) == 1
    assert "the row has no answer" in capsys.readouterr().err
    assert (
        tool("import_dataset").main([str(data), str(tmp_path / "out"), "--processes", "1", "--max-dropped", "0.5"]) == 0
    )


@pytest.mark.parametrize("answer_type", ["short_text", "json"])
def test_every_answer_type_of_the_reward_can_be_said(tmp_path, answer_type):
    data = source(tmp_path, '{"age": 7}')
    arguments = [str(data), str(tmp_path / "out"), "--processes", "1", "--answer-type", answer_type]
    assert tool("import_dataset").main(arguments) == 0
    (record,) = read_records(tmp_path / "out/records.jsonl", max_corrupt_fraction=0).records
    assert (record.answer, record.answer_type) == ('{"age": 7}', answer_type)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["none.parquet", "out"], "does not exist"),
        (["train.parquet", "out", "--format", "verl"], "none of 1 rows"),
        (["unclear.jsonl", "out"], "--format"),
    ],
)
def test_what_cannot_be_imported_is_said(tmp_path, capsys, arguments, reason):
    source(tmp_path, "7")
    (tmp_path / "unclear.jsonl").write_text('{"a": 1}')
    paths = [str(tmp_path / name) for name in arguments[:2]]
    assert tool("import_dataset").main([*paths, *arguments[2:]]) == 2
    assert reason in capsys.readouterr().err
