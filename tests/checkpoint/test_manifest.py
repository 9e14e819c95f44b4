import hashlib
import json

import pytest
from watched_disk import watched_disk

from perl_megatron.checkpoint.manifest import (
    MANIFEST,
    PendingCheckpoint,
    StoppedError,
    latest_checkpoint,
    list_checkpoints,
    verify_checkpoint,
)
from perl_megatron.checkpoint.retention import Retention
from perl_megatron.errors import UserError


def write(directory, step, *, keep=9, text="weights"):
    pending = PendingCheckpoint.begin(directory, step)
    pending.write("a.txt", f"{text} of step {step}")
    pending.write("b.txt", "x" * 100)
    return pending.commit(Retention(keep=keep))


def test_a_complete_checkpoint_verifies_and_the_newest_is_found(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    for step in (2, 10, 9):
        write(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000009", "step-00000010"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000010"


def test_all_but_the_newest_are_deleted(tmp_path):
    for step in range(1, 6):
        write(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_an_interrupted_save_is_no_checkpoint_and_is_cleared_by_the_next(tmp_path):
    write(tmp_path, 1)
    interrupted = PendingCheckpoint.begin(tmp_path, 2)
    interrupted.write("a.txt", "half")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000001"
    write(tmp_path, 3)
    assert not interrupted.temporary.exists()


def test_saving_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 1)
    checkpoint = write(tmp_path, 1, text="other")
    verify_checkpoint(checkpoint)
    assert (checkpoint / "a.txt").read_text() == "other of step 1"
    assert len(list(tmp_path.iterdir())) == 1


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "flipped": flip_a_byte,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_names_the_file_and_the_one_before_is_taken(tmp_path, damage, caplog):
    write(tmp_path, 1)
    checkpoint = write(tmp_path, 2)
    DAMAGES[damage](checkpoint / "b.txt")
    with pytest.raises(UserError, match=r"b\.txt"):
        verify_checkpoint(checkpoint)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000001"
    assert "b.txt" in caplog.text


MALFORMED = [
    *("", "{", "[]", "{}", '{"format": []}', '{"format": 2}', '{"format": 2, "files": ["a.txt"]}'),
    '{"format": 2, "files": {"a.txt": 3}}',
    '{"format": 2, "files": {"a.txt": {"size": 3}}}',
    '{"format": 2, "files": {"a.txt": {"size": 3, "blake2b": ""}}}',
    '{"format": 1, "files": {"a.txt": {"size": 3, "sha256": ""}}}',
]


@pytest.mark.parametrize("text", MALFORMED)
def test_a_damaged_manifest_is_named(tmp_path, text):
    checkpoint = write(tmp_path, 1)
    (checkpoint / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=MANIFEST):
        verify_checkpoint(checkpoint)


def test_what_is_wrong_is_told_with_the_given_advice(tmp_path):
    checkpoint = write(tmp_path, 1)
    (checkpoint / "a.txt").unlink()
    for _ in range(2):
        with pytest.raises(UserError, match="copy it again") as raised:
            verify_checkpoint(checkpoint, fix="copy it again")
        assert "continue from another" not in str(raised.value)
        (checkpoint / MANIFEST).write_text("{")


def test_checkpoints_of_the_first_format_are_read(tmp_path):
    checkpoint = write(tmp_path, 1)
    content = json.loads((checkpoint / MANIFEST).read_text())
    assert content["format"] == 2
    files = {
        name: {
            "size": entry["size"],
            "blake2b": hashlib.blake2b((checkpoint / name).read_bytes(), digest_size=32).hexdigest(),
        }
        for name, entry in content["files"].items()
    }
    (checkpoint / MANIFEST).write_text(json.dumps({**content, "format": 1, "files": files}))
    verify_checkpoint(checkpoint)
    assert latest_checkpoint(tmp_path) == checkpoint
    flip_a_byte(checkpoint / "b.txt")
    with pytest.raises(UserError, match=r"b\.txt"):
        verify_checkpoint(checkpoint)


def test_reading_stops_when_it_is_told_to(tmp_path, monkeypatch):
    checkpoint = write(tmp_path, 1)
    monkeypatch.setattr("perl_megatron.checkpoint.manifest._CHUNK_BYTES", 10)
    answers = [True, True, False]
    with pytest.raises(StoppedError):
        verify_checkpoint(checkpoint, keep_on=lambda: answers.pop(0))
    assert answers == []


def test_another_format_is_refused(tmp_path):
    checkpoint = write(tmp_path, 1)
    content = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(UserError, match="99"):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..", ""])
def test_a_manifest_that_names_a_file_outside_is_refused(tmp_path, name):
    checkpoint = write(tmp_path, 1)
    (tmp_path / "secret").write_text("secret")
    content = json.loads((checkpoint / MANIFEST).read_text())
    entry = {"size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    (checkpoint / MANIFEST).write_text(json.dumps({**content, "files": {name: entry}}))
    with pytest.raises(UserError, match=f"(?s)outside the checkpoint.*{MANIFEST}"):
        verify_checkpoint(checkpoint)


def test_the_newest_up_to_a_step(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path, step)
    flip_a_byte(tmp_path / "step-00000004" / "a.txt")
    found = {step: latest_checkpoint(tmp_path, up_to=step) for step in (1, 3, 5, 6)}
    two = tmp_path / "step-00000002"
    assert found == {1: None, 3: two, 5: two, 6: tmp_path / "step-00000006"}


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path):
    write(tmp_path, 1)
    pending = PendingCheckpoint.begin(tmp_path, 2)
    (pending.temporary / "metadata.json").write_text("a library wrote it, and did not wait for the disk")
    with watched_disk() as disk:
        pending.commit(Retention())
    assert disk.lost() == []


def test_a_failed_write_is_a_clear_error_and_keeps_the_earlier_checkpoint(tmp_path):
    write(tmp_path, 1)
    pending = PendingCheckpoint.begin(tmp_path, 2)
    with pytest.raises(UserError, match="FileNotFoundError"):
        pending.write("no/such/folder.txt", "")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000001"
