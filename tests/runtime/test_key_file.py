"""What a key file may hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from perl_megatron.errors import UserError
from perl_megatron.runtime.key_file import MIN_CHARACTERS, read_key

GOOD = "a" * MIN_CHARACTERS
SETTING = "rollout.api_key_file"


def test_no_file_is_no_key() -> None:
    assert read_key(None, SETTING) is None


@pytest.mark.parametrize("text", [GOOD, f"{GOOD}\n", f"  {GOOD}\r\nnotes\n"])
def test_the_first_line_is_the_key(tmp_path: Path, text: str) -> None:
    file = tmp_path / "key"
    file.write_bytes(text.encode())
    assert read_key(file, SETTING) == GOOD


@pytest.mark.parametrize("text", ["", "\n" + GOOD, GOOD[:-1], GOOD + " b", GOOD + "\tb", GOOD + "\x00", GOOD + "é"])
def test_what_is_no_key_is_refused_with_a_way_to_make_one(tmp_path: Path, text: str) -> None:
    file = tmp_path / "key"
    file.write_bytes(text.encode())
    with pytest.raises(UserError) as caught:
        read_key(file, SETTING)
    assert f"rollout.api_key_file = {file}" in str(caught.value.where)
    assert caught.value.fix
    assert GOOD not in str(caught.value)  # a key does not get into logs


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read") as caught:
        read_key(tmp_path / "none", SETTING)
    assert str(tmp_path / "none") in str(caught.value.where)
