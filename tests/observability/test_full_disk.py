"""What a run's logs do where their disk is full: on a real one, of a few pages."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_disk import PAGE, Ballast, small_disk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from perl_megatron.config.load import load_config
from perl_megatron.observability import append_file
from perl_megatron.observability.append_file import AppendFile
from perl_megatron.observability.full_disk import FullDisk
from perl_megatron.observability.group_ledger import GroupLedger
from perl_megatron.observability.journal import Journal
from perl_megatron.observability.json_lines import read_rows, write_rows
from perl_megatron.observability.memory import PeakMemory
from perl_megatron.observability.metrics_log import MetricsLog
from perl_megatron.observability.run_folder import RunFolder
from perl_megatron.types import EncodedPrompt, Group, Record, Rollout, View


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", num_kib=256) as folder:
        yield folder


def test_whole_records_in_order_whenever_there_is_space(disk: Path) -> None:
    """However the space comes and goes, the file never holds a part of a record, and in the end all of them."""
    randomness, ballast, told = random.Random(0), Ballast(disk), list[str]()
    account = FullDisk(told.append)
    file = AppendFile(disk / "log", account, what="records")
    ballast.fill()
    written = b""
    for number in range(60):
        record = f"{number:03d}".encode() * randomness.randrange(1, PAGE) + b"\n"
        file.append(record)
        written += record
        there = (disk / "log").read_bytes()
        assert written.startswith(there)
        assert there == b"" or there.endswith(b"\n")
        if randomness.random() < 0.3:
            ballast.free(PAGE * randomness.randrange(1, 4))
        if randomness.random() < 0.3:
            ballast.fill()
    assert len((disk / "log").read_bytes()) < len(written)
    with pytest.raises(OSError, match="No space left"):
        (disk / "other").write_bytes(bytes(2 * PAGE))
    ballast.free()
    (disk / "other").unlink()
    file.sync()
    there = (disk / "log").read_bytes()
    assert written.startswith(there)
    assert len(there) > 100_000
    assert len(told) == 1


def test_what_waits_too_long_is_counted(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append_file, "MAX_WAITING_BYTES", 3 * PAGE)
    ballast, told = Ballast(disk), list[str]()
    account = FullDisk(told.append)
    file = AppendFile(disk / "log", account, what="records")
    ballast.fill()
    for number in range(5):
        file.append(bytes([65 + number]) * PAGE, count=2)
    assert account.missing == {"records": 4}
    ballast.free()
    file.append(b"last")
    assert (disk / "log").read_bytes() == b"C" * PAGE + b"D" * PAGE + b"E" * PAGE + b"last"
    Ballast(disk).fill()
    file.append(bytes(PAGE))
    file.close()
    account.tell_missing()
    assert told[1:] == ["the disk was full; missing: records (5)"]


def test_metrics_and_events_go_on_when_there_is_space_again(disk: Path) -> None:
    told, ballast = list[str](), Ballast(disk)
    account = FullDisk(told.append)
    log = MetricsLog(disk / "metrics.jsonl", disk / "tensorboard", disk=account)
    ledger = GroupLedger(disk / "groups.jsonl", disk=account)
    ballast.fill()
    for step in range(1, 101):
        log.log(step, {"loss": step, "kl": 0.5})
        ledger.write(step, [{"step": step, "record": "a"}, {"step": step, "record": "b"}])
        log.sync()
        ledger.sync()
    assert log.value(100, "loss") == 100.0, "a row that waits is known, so that a checkpoint can be the best one"
    assert [row["step"] for row in read_rows(disk / "metrics.jsonl")] == list(range(1, 101))[: len(read_rows(log.path))]
    assert len(read_rows(log.path)) < 100
    ballast.free()
    log.log(101, {"loss": 101.0})
    ledger.write(101, [{"step": 101}])
    log.close()
    ledger.close()
    account.tell_missing()
    assert [row["step"] for row in read_rows(disk / "metrics.jsonl")] == list(range(1, 102))
    assert len(read_rows(disk / "groups.jsonl")) == 201
    events = EventAccumulator(str(disk / "tensorboard"), {"scalars": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(n, float(n)) for n in range(1, 102)]
    assert len(told) == 2
    assert "the disk is full: No space left on device" in told[0]
    assert told[1] == "the disk was full; nothing is missing"


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    account = FullDisk(pytest.fail)
    with pytest.raises(PermissionError), account.tolerated("rows"):
        raise PermissionError(13, "Permission denied")
    with pytest.raises(OSError, match="Input/output error"), account.tolerated("rows"):
        raise OSError(5, "Input/output error")
    file = AppendFile(tmp_path / "log", account, what="records")
    file.close()
    with pytest.raises(ValueError, match="closed file"):
        file.append(b"after its end")
    assert not account.missing


def make_group(size: int) -> Group:
    record = Record("r", (), "<image> which?", "A", kind="find")
    view = View("r", 0, (0,), (), "which?", "A", "choice", "find")
    prompt = EncodedPrompt(np.zeros(3, np.int64), (0,), (0,), np.ones((1, 3), np.int64), (f"key{size}",))
    tokens, log_probs = np.zeros(2, np.int64), np.zeros(2, np.float32)
    rollout = Rollout(0, tokens, log_probs, "stop", "x" * size, tokens, {"accuracy": 1.0}, 1.0)
    return Group(record, (view,), (prompt,), [rollout])


def noise(key: str) -> Image.Image:
    """Cannot be compressed."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8))


def open_journal(disk: Path, *, first_step: int = 0) -> Journal:
    loaded = load_config(None, ["model.path=m", f"run.directory={disk}", "run.name=demo"])
    folder = RunFolder.create(loaded, resume=first_step > 0)
    options = {"total_steps": 5, "writes": True, "image_of": noise, "seconds_before": 0.0}
    return Journal(folder, first_step=first_step, memory=PeakMemory(), **options)


def evaluate(journal: Journal, step: int) -> None:
    answers = [{"text": "y" * 10_000}]
    metrics = {"evaluation/accuracy": 0.5, "evaluation/flip_rate": 0.0}
    journal.evaluation(step, metrics, lambda path: write_rows(path, answers))


def test_a_journal_outlives_a_full_disk_and_leaves_nothing_torn(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal, ballast = open_journal(disk), Ballast(disk)
    folder = journal.folder
    for step in (1, 2, 3):
        if step == 2:
            ballast.fill()
        journal.groups(step, [{"step": step, "text": "z" * 5000}])
        journal.rollouts(step, [make_group(9000 + step)], [])
        journal.step(step, {"loss": 0.5})
        evaluate(journal, step)
        journal.sync()
        if step == 2:
            journal.summarize(engine="none", layout="one")
            journal.report()
            assert list(folder.root.rglob("*.tmp")) == []
            ballast.free()
    journal.summarize(engine="none", layout="one")
    journal.report()
    journal.close()
    assert [row["step"] for row in read_rows(folder.metrics)] == [1, 1, 2, 2, 3, 3]
    assert [row["step"] for row in read_rows(folder.groups)] == [1, 2, 3]
    assert [path.name for path in sorted(folder.rollouts.glob("*.jsonl"))] == ["step-000001.jsonl", "step-000003.jsonl"]
    assert sorted(path.name for path in folder.evaluations.iterdir()) == ["step-000001.jsonl", "step-000003.jsonl"]
    for image in folder.rollouts.glob("images/*"):
        Image.open(image).load()
    err = capsys.readouterr().err
    assert err.count("the disk is full") == 1
    for missing in (
        "recorded steps (1)",
        "answers of evaluations (1)",
        "report, which --resume writes (1)",
        "summary, which",
    ):
        assert missing in err.splitlines()[-1]
    open_journal(disk, first_step=2).close()
    assert [row["step"] for row in read_rows(folder.metrics)] == [1, 1, 2, 2]


def test_what_a_run_shows_may_be_on_the_full_disk_too(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ballast = Ballast(disk)
    with (disk / "console.log").open("wb", buffering=0) as raw:

        class Console:
            """Standard error, unbuffered, in a file."""

            isatty = staticmethod(lambda: False)
            flush = staticmethod(lambda: None)

            def write(self, text: str) -> None:
                raw.write(text.encode())

        monkeypatch.setattr("sys.stderr", Console())
        journal = open_journal(disk)
        ballast.fill()
        for step in range(1, 200):
            journal.step(step, {"loss": 0.5})
            journal.note("a line")
        ballast.free()
        journal.close()
    assert "lines of what the run shows" in (disk / "console.log").read_text().splitlines()[-1]
    assert len(read_rows(journal.folder.metrics)) == 199
