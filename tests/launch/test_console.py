"""What is shown on a full disk, by a program whose exit status says whether that did it harm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from small_disk import PAGE, Ballast, small_disk

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
