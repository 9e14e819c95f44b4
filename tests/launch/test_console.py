"""What is shown on a full disk, or to nobody, by programs whose exit status says whether that did them harm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_disk import PAGE, Ballast, small_disk

from perl_megatron import cli
from perl_megatron.launch.console import EXIT_UNREAD

ROOT = Path(__file__).parents[2]
POLICY = ROOT / "examples" / "qwen2_5_vl" / "7b"
PLAN = ("plan", f"{POLICY}.yaml", f"model.path={POLICY}", "rollout.engine=embedded")

PROGRAM = """
import sys
from pathlib import Path
from perl_megatron.launch.console import say, show
show("x" * 10_000, "stdout")
say("y" * 10_000)
Path(sys.argv[1]).unlink()
show("after\\n", "stdout")
say("after")
sys.exit(75)
"""


def test_a_full_disk_changes_no_exit_status_and_shows_what_comes_later(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", num_kib=64) as disk:
        ballast = Ballast(disk)
        with (disk / "out").open("w") as out, (disk / "err").open("w") as err:
            ballast.fill()
            command = [sys.executable, "-c", PROGRAM, str(disk / "ballast")]
            environment = {**os.environ, "PYTHONPATH": os.getcwd()}
            status = subprocess.run(command, stdout=out, stderr=err, env=environment, check=False).returncode
        assert status == 75
        for name in ("out", "err"):
            shown = (disk / name).read_text()
            assert shown.endswith("after\n")
            assert len(shown) < PAGE


SHORT = """
import sys
from perl_megatron import cli
cli.run_doctor = lambda *_: print("short") or 0
sys.exit(cli.main(["doctor"]))
"""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("-m", "perl_megatron", *PLAN), EXIT_UNREAD),
        (("-c", SHORT), EXIT_UNREAD),  # which is written when the command is over
        (("-m", "perl_megatron", "--help"), 0),  # argparse says nothing of it
    ],
    ids=("long", "short", "help"),
)
def test_a_reader_that_goes_ends_a_command_quietly(arguments, status):
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run([sys.executable, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (status, "")


def test_another_broken_pipe_is_an_error_like_others(monkeypatch):
    def fail(*_):
        raise BrokenPipeError

    monkeypatch.setattr(cli, "run_doctor", fail)
    with pytest.raises(BrokenPipeError):
        cli.main(["doctor"])
