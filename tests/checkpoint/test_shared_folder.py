"""A folder that several nodes see, not always the same way (``shared_folder_worker.py`` says how)."""

from pathlib import Path

from launch_ranks import launch_ranks

from perl_megatron.checkpoint import shared_folder
from perl_megatron.checkpoint.shared_folder import unseen

WORKER = Path(__file__).with_name("shared_folder_worker.py")


def test_two_ranks_that_see_other_files_write_and_resume_the_same_checkpoint(tmp_path):
    launch_ranks(WORKER, tmp_path, log=tmp_path / "log", timeout=180)
    assert (tmp_path / "done").read_text() == "done"


def test_a_file_is_waited_for_until_it_has_its_size(tmp_path, monkeypatch):
    file, lengths = tmp_path / "a", [0, 3, 7]
    monkeypatch.setattr(shared_folder.time, "sleep", lambda _: file.write_bytes(b"x" * lengths.pop(0)))
    assert unseen(tmp_path, {"a": 7}) is None
    assert lengths == []
    monkeypatch.undo()
    monkeypatch.setattr(shared_folder, "SIGHT_SECONDS", 0.0)
    assert unseen(tmp_path, {"a": 7, "b": 1}) == "b"
    assert unseen(tmp_path, {"a": 6}) == "a"
