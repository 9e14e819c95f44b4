"""Submission beside other jobs of the same run, with a stand-in for Slurm; test_slurm_jobs.py has a real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from perl_megatron.errors import UserError
from perl_megatron.launch.slurm import JobFiles
from perl_megatron.launch.slurm_queue import check_alone, jobs_in_queue, submit


class Queue:
    """What `squeue` and `sbatch` say."""

    def __init__(self, folder: Path):
        self.folder = folder

    def program(self, name: str, text: str) -> None:
        file = self.folder / name
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)

    def has(self, *lines: str) -> None:
        self.program("squeue", "\n".join(f"echo '{line}'" for line in lines))


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    return Queue(tmp_path / "bin")


def submitted(root: Path, token: str, number: int, command: str = "train") -> JobFiles:
    """The files of a job."""
    files = JobFiles(root, token)
    root.mkdir(exist_ok=True)
    files.config.write_text("")
    files.script(number).write_text(f"#!/bin/bash\nconfig={files.config}\ncommand={command}\n")
    return files


def check(root: Path, command: str = "train", *sbatch_options: str) -> bool:
    return check_alone(JobFiles(root, "new"), "mine", command=command, sbatch_options=sbatch_options)


@pytest.mark.parametrize(("theirs", "mine"), [("train", "train"), ("sft", "train"), ("eval", "eval")])
def test_two_jobs_do_not_write_the_same_files(queue: Queue, tmp_path: Path, theirs: str, mine: str) -> None:
    root = tmp_path / "mine.slurm"
    submitted(root, "a", 7, theirs)
    queue.has("7 PENDING", "12 RUNNING")  # another folder's run may have the name
    with pytest.raises(UserError, match=r"job 7 \(PENDING\) of the same run is not over") as error:
        check(root, mine)
    assert "--dependency=afterany:7" in error.value.fix
    assert check(root, mine, "--exclusive", "--dependency=afterany:7")
    assert not check(root, "train" if mine == "eval" else "eval")
    assert jobs_in_queue("mine") == {7: "PENDING", 12: "RUNNING"}


@pytest.mark.parametrize(
    ("dependency", "waits"),
    [
        ("afterany:7", True),
        ("7", True),
        ("after:5,afternotok:6:7:8", True),
        ("afterok:7,after:5", True),
        ("singleton", True),
        ("afterany:999", False),
        ("afterany:77", False),
        ("after:7", False),  # its beginning
        ("after:7+5", False),
        ("aftercorr:7", False),
        ("afterany:999?afterany:7", False),  # whichever ends first
    ],
)
def test_a_job_waits_for_the_one_that_it_names(queue: Queue, tmp_path: Path, dependency: str, waits: bool) -> None:
    root = tmp_path / "mine.slurm"
    submitted(root, "a", 7)
    queue.has("7 RUNNING")
    if waits:
        assert check(root, "train", f"--dependency={dependency}")
        with pytest.raises(UserError, match="job 7"):  # of several, Slurm takes one
            check(root, "train", f"--dependency={dependency}", "--dependency=after:7")
    else:
        with pytest.raises(UserError, match="job 7"):
            check(root, "train", f"--dependency={dependency}")


def test_a_job_waits_for_all_that_there_are(queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "mine.slurm"
    submitted(root, "a", 7)
    submitted(root, "b", 8)
    queue.has("7 RUNNING", "8 PENDING")
    with pytest.raises(UserError, match="job 7") as error:
        check(root, "train", "--dependency=afterany:8")
    assert "--dependency=afterany:7:8]" in (error.value.fix or "")
    assert check(root, "train", "--dependency=afterany:7:8")
    assert check(root, "train", "--dependency=singleton")
    monkeypatch.setattr("os.getuid", lambda: 12345)  # Slurm looks at jobs of this user only
    with pytest.raises(UserError, match="of the same run is not over"):
        check(root, "train", "--dependency=singleton")


def test_what_jobs_left_that_are_over_is_removed(queue: Queue, tmp_path: Path) -> None:
    root = tmp_path / "mine.slurm"
    over, waiting = submitted(root, "a", 7), submitted(root, "b", 8, "eval")
    being_submitted = JobFiles(root, "c").config
    being_submitted.touch()
    for name in ("job-7.log", "job-mine.sbatch"):
        (root / name).touch()
    queue.has("8 PENDING")
    assert not check(root, "train", "--dependency=afterany:8")  # another kind of job
    left = [waiting.config, waiting.script(8), being_submitted, root / "job-7.log", root / "job-mine.sbatch"]
    assert sorted(root.iterdir()) == sorted(left)
    assert not over.config.exists()


def test_nothing_is_submitted_or_removed_where_slurm_does_not_answer(queue: Queue, tmp_path: Path) -> None:
    files = submitted(tmp_path / "mine.slurm", "a", 7)
    queue.program("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(UserError, match="Slurm does not answer: Unable to contact"):
        check(files.root)
    assert files.config.exists()


def test_sbatch_reads_the_script_once(queue: Queue, tmp_path: Path) -> None:
    files = JobFiles(tmp_path / "mine.slurm", "a")
    files.root.mkdir()
    files.config.touch()
    queue.program("sbatch", f'cat > {tmp_path}/read; [ "$*" = --parsable ] && echo "9;cluster"')
    assert submit(files, "script\n") == 9
    assert (tmp_path / "read").read_text() == files.script(9).read_text() == "script\n"
    assert sorted(files.root.iterdir()) == [files.config, files.script(9)]
    queue.program("sbatch", "echo 'sbatch: error: no' >&2; exit 1")
    files.script(9).unlink()
    with pytest.raises(UserError, match="Slurm refused the job: sbatch: error: no"):
        submit(files, "script\n")
    assert not files.root.exists()


def test_a_job_is_not_submitted_before_its_script_is_there(queue: Queue, tmp_path: Path) -> None:
    files = JobFiles(tmp_path / "mine.slurm", "a")
    files.root.mkdir()
    files.config.touch()
    queue.program("sbatch", f"touch {tmp_path}/called; echo 9")
    files.draft.mkdir()  # as where the disk is full
    with pytest.raises(OSError, match="directory"):
        submit(files, "script\n")
    assert not (tmp_path / "called").exists()
    files.draft.rmdir()
    files.script(9).mkdir()
    with pytest.raises(UserError, match="job 9 is in Slurm's queue") as error:
        submit(files, "script\n")
    assert "scancel 9" in (error.value.fix or "")
    assert files.draft.read_text() == "script\n"
