import io
import subprocess
import sys
import time

import pytest

from perl_megatron.observability import memory
from perl_megatron.observability.memory import PeakMemory, tree_rss_gib
from perl_megatron.observability.phases import Phases
from perl_megatron.observability.progress import RunProgress, step_line


def test_phases_add_up_and_restart():
    entered = []
    phases = Phases(on_enter=lambda name, facts: entered.append(name))
    for _ in range(2):
        with phases("update"):
            assert phases.current == "update"
            time.sleep(0.02)
    assert phases.current is None
    first = phases.take()
    assert entered == ["update", "update"]
    assert first["seconds/step"] >= first["seconds/update"] >= 0.04
    assert set(phases.take()) == {"seconds/step"}


def test_an_error_names_its_phase():
    phases = Phases()
    with pytest.raises(RuntimeError) as caught, phases("generate"):
        raise RuntimeError("broken")
    assert caught.value.__notes__ == ["in phase 'generate'"]
    assert phases.current is None


def test_plain_progress_lines():
    stream = io.StringIO()
    progress = RunProgress("demo", 10, first_step=4, stream=stream)
    progress.phase("update")
    progress.step(5, {"loss": 0.5, "reward/mean": 0.25, "groups/kept": 3, "groups/dropped": 1, "seconds/step": 2})
    progress.note("saved")
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("[demo] step 5/10  loss 0.5000  reward 0.250  groups 3 kept, 1 dropped  2.0 s  left 0:0")
    assert lines[1] == "[demo] saved"


def test_time_left(monkeypatch):
    clock = iter([0.0, 10.0, 30.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = RunProgress("demo", 100, stream=stream)
    progress.step(1, {})
    progress.step(2, {})
    assert stream.getvalue().splitlines()[1].endswith("left 0:24:30")  # 98 steps of 15 s


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar_on_a_terminal():
    stream = Terminal()
    progress = RunProgress("demo", 2, stream=stream)
    progress.phase("generate")
    progress.step(2, {"loss": 0.5})
    progress.note("evaluation 50 % [bold]")
    progress.close()
    assert "2/2" in stream.getvalue()
    assert "evaluation 50 % [bold]" in stream.getvalue()


def test_step_line_shows_what_is_there():
    assert step_line({}) == ""
    assert step_line({"throughput/tokens_per_second": 812.4}) == "812 tokens/s"


def test_sampling_memory_takes_a_hundredth_of_a_core_at_most(monkeypatch):
    taken = []

    def sample(root_pid):
        begin = time.thread_time()
        while time.thread_time() - begin < 0.02:
            pass
        taken.append(time.monotonic())
        return 1.0

    monkeypatch.setattr(memory, "tree_rss_gib", sample)
    peak = PeakMemory(interval=0.001)
    until = time.monotonic() + 60
    while len(taken) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert peak.gib == peak.gib == 1.0  # which takes no sample
    peak.close()
    first, second = taken[:2]
    assert second - first >= 0.02 / memory.SHARE


def test_peak_memory_counts_children():
    # Far more than what other processes add and take by beginning or ceasing to share torch's pages with this one.
    code = "x = bytearray(600 * 2**20); print('ready', flush=True); input()"
    before = tree_rss_gib()
    peak = PeakMemory(interval=0.05)
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        until = time.monotonic() + 60
        while peak._peak - before < 0.45 and time.monotonic() < until:
            time.sleep(0.05)
        child.communicate(b"\n")
    assert peak.gib - before > 0.45
    assert tree_rss_gib() - before < 0.2
    peak.close()
    assert tree_rss_gib(2**22 - 1) == 0.0  # no such process
