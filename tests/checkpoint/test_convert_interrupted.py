"""Conversions that are interrupted, that meet, and that fail late: nothing is lost, and no target looks complete."""

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from random_checkpoint import MAX_FILE_BYTES, assert_same_bits, conversion, make_random_checkpoint

from perl_megatron.checkpoint.manifest import verify_checkpoint
from perl_megatron.checkpoint.open_weights import open_weights
from perl_megatron.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_random_checkpoint(tmp_path_factory.mktemp("interrupted") / "source")


KILLED = """
import os, signal, sys, time
from pathlib import Path
from perl_megatron.checkpoint.convert import plan_conversion
source, target, to = map(Path, sys.argv[1:])
journal = target.with_name(f".{target.name}.partial.jsonl")
written = 0
def progress(nbytes):
    global written
    written += nbytes
    if written > 2_000_000:
        while journal.read_text().count("\\n") < 4:  # recording goes on in the background
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
plan_conversion(source, target, to=str(to), tensor_size=1, max_file_bytes=%d).run(progress=progress)
"""


def interrupt(plan, *, after=2_000_000, error=KeyboardInterrupt):
    """Run until so many bytes are on their way and three groups are recorded; the journal's path."""
    written, journal = 0, plan.target_path.with_name(f".{plan.target_path.name}.partial.jsonl")

    def progress(nbytes):
        nonlocal written
        written += nbytes
        if written > after:
            while journal.read_text().count("\n") < 4:
                time.sleep(0.01)
            raise error

    with pytest.raises(error):
        plan.run(progress=progress)
    return journal


@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_a_killed_conversion_leaves_no_target_and_can_go_on(source, tmp_path, to):
    killed = subprocess.run([sys.executable, "-c", KILLED % MAX_FILE_BYTES, source, tmp_path / "a", to])
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "a").exists()
    partial, journal = tmp_path / ".a.partial", tmp_path / ".a.partial.jsonl"
    finished = [name for line in journal.read_text().splitlines()[1:] for name in json.loads(line)["files"]]
    assert len(finished) >= 3
    journal.open("a").write('{"group": 99, "fil')  # cut off while it was written
    damaged, kept = partial / finished[0], partial / finished[1]
    damaged.write_bytes(bytes(damaged.stat().st_size))
    written = kept.stat().st_mtime_ns, kept.stat().st_ino
    with pytest.raises(UserError, match="another conversion"):
        conversion(source, tmp_path / "a", to, dtype=torch.float32).run(resume=True)
    conversion(source, tmp_path / "a", to).run(resume=True)
    assert_same_bits(tmp_path / "a", source)
    final = tmp_path / "a" / kept.name
    assert (final.stat().st_mtime_ns, final.stat().st_ino) == written
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    if to == "torch_dist":
        verify_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("options", [{}, {"tensor_size": 2}], ids=["the same", "another"])
def test_without_resume_an_interrupted_conversion_is_refused_and_untouched(source, tmp_path, options):
    journal = interrupt(conversion(source, tmp_path / "a"))
    before = journal.read_text()
    with pytest.raises(UserError, match=r"(?s)an interrupted conversion is there.*--resume, or remove .*\.a\.partial"):
        conversion(source, tmp_path / "a", **options).run()
    assert journal.read_text() == before
    assert len(list((tmp_path / ".a.partial").iterdir())) >= 3
    shutil.rmtree(tmp_path / ".a.partial")
    conversion(source, tmp_path / "a", **options).run()  # as the message says
    assert_same_bits(tmp_path / "a", source)


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_without_a_journal_is_nobodys_to_remove(source, tmp_path, resume):
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "stranger").write_text("left behind")
    for _ in range(2):
        with pytest.raises(UserError, match="no journal"):
            conversion(source, tmp_path / "a").run(resume=resume)
    assert [path.name for path in tmp_path.rglob("*")] == [".a.partial", "stranger"]


def test_what_fails_before_anything_is_finished_needs_no_resume(source, tmp_path):
    with pytest.raises(RuntimeError):
        conversion(source, tmp_path / "a").run(progress=lambda nbytes: exec("raise RuntimeError"))
    assert list(tmp_path.iterdir()) == []
    conversion(source, tmp_path / "a").run(resume=True)  # nothing to go on from is no error either
    assert_same_bits(tmp_path / "a", source)


def test_two_conversions_to_one_target_do_not_meet(source, tmp_path):
    first = conversion(source, tmp_path / "a")
    second = conversion(source, tmp_path / "a", tensor_size=2)
    seen = []

    def progress(nbytes):
        if nbytes and not seen:
            for resume in (False, True):
                with pytest.raises(UserError, match=r"(?s)another conversion is writing.*\.a\.partial") as raised:
                    second.run(resume=resume)
                seen.append(raised)

    first.run(progress=progress)
    assert len(seen) == 2
    verify_checkpoint(tmp_path / "a")
    assert_same_bits(tmp_path / "a", source)
    with pytest.raises(UserError, match="the target exists"):
        second.run()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("change", [Path.unlink, lambda file: file.write_bytes(b"short")], ids=["removed", "changed"])
def test_a_file_that_vanishes_meanwhile_is_noticed(source, tmp_path, monkeypatch, change):
    def finish(self, folder, records):
        change(folder / self.groups[1].files[0])

    monkeypatch.setattr("perl_megatron.checkpoint.hf_target.HuggingFaceTarget.finish", finish)
    with pytest.raises(UserError, match=r"(?s)changed or removed meanwhile.*model-00002"):
        conversion(source, tmp_path / "a", "hf").run()
    assert not (tmp_path / "a").exists()


def test_a_link_to_nothing_is_an_existing_target(source, tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="the target exists"):
        conversion(source, tmp_path / "a")


def failing(name, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(name, fail)


@pytest.mark.parametrize("point", ["manifest_text", "write", "rename", "sync"])
def test_a_late_failure_loses_nothing(source, tmp_path, monkeypatch, point):
    failure = OSError(errno.EIO, "bad disk")
    with monkeypatch.context() as patch:
        if point == "write":  # after this attempt's manifest
            failing("perl_megatron.checkpoint.conversion.PartialFolder.publish", patch, failure)
        elif point == "manifest_text":
            failing("perl_megatron.checkpoint.conversion.manifest_text", patch, failure)
        elif point == "rename":
            failing("pathlib.Path.rename", patch, failure)
        else:
            failing("perl_megatron.checkpoint.disk.sync_folder", patch, failure)
        with pytest.raises(UserError, match=r"(?s)cannot write the target: bad disk.*--resume"):
            conversion(source, tmp_path / "a").run()
    assert not (tmp_path / "a").exists()
    failing("perl_megatron.checkpoint.torch_dist_writer.TorchDistTarget.write", monkeypatch, AssertionError("again"))
    conversion(source, tmp_path / "a").run(resume=True)
    verify_checkpoint(tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    written = {file.name for file in (tmp_path / "a").iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == written
    assert_same_bits(tmp_path / "a", source)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_journal_outlives_the_folders_old_name(source, tmp_path, monkeypatch):
    # Killed between the renaming and the journal's removal: the target is whole, and a new one can be made.
    failing("pathlib.Path.unlink", monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        conversion(source, tmp_path / "a").run()
    monkeypatch.undo()
    verify_checkpoint(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    conversion(source, tmp_path / "a").run()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize(
    "damage", [b"\0" * 40 + b"\n", b'{"group": 0}\n', b"[]\n", b"\xff\xfe"], ids=["zeros", "keys", "list", "bytes"]
)
def test_a_damaged_journal_counts_up_to_the_damage(source, tmp_path, damage):
    journal = interrupt(conversion(source, tmp_path / "a"))
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:2]) + damage + b"".join(lines[2:]))
    conversion(source, tmp_path / "a").run(resume=True)
    verify_checkpoint(tmp_path / "a")
    assert_same_bits(tmp_path / "a", source)


@pytest.mark.parametrize("content", [b"", b"\0" * 100], ids=["empty", "zeros"])
def test_an_empty_journal_has_recorded_nothing(source, tmp_path, content):
    journal = interrupt(conversion(source, tmp_path / "a"))
    (tmp_path / ".a.partial" / "stranger").write_text("not from here")
    journal.write_bytes(content)
    conversion(source, tmp_path / "a").run(resume=True)
    verify_checkpoint(tmp_path / "a")
    assert not (tmp_path / "a" / "stranger").exists()


def test_unfinished_files_make_room_on_resume(source, tmp_path, monkeypatch):
    interrupt(conversion(source, tmp_path / "a"))
    (tmp_path / ".a.partial" / "__0_99.distcp").write_bytes(bytes(3_000_000))
    partial = tmp_path / ".a.partial"

    def usage(path):
        used = sum(file.stat().st_size for file in partial.rglob("*"))
        return shutil._ntuple_diskusage(0, used, 3_600_000 - used)

    monkeypatch.setattr("shutil.disk_usage", usage)
    conversion(source, tmp_path / "a").run(resume=True)
    assert_same_bits(tmp_path / "a", source)


def test_progress_counts_what_is_written_not_what_is_read_ahead(source, tmp_path):
    counted, largest = [], max(open_weights(source).info(name).nbytes for name in open_weights(source))
    partial = tmp_path / ".a.partial"

    def progress(nbytes):
        counted.append(nbytes)
        assert sum(counted) <= sum(file.stat().st_size for file in partial.iterdir()) + largest

    plan = conversion(source, tmp_path / "a", "hf")
    plan.run(progress=progress)
    assert sum(counted) == plan.nbytes
