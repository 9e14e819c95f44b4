import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from perl_megatron.runtime.signals import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_becomes_a_request(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested()
        assert stop.received == number
    assert signal.getsignal(number) is before


def test_a_second_interrupt_interrupts():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_comes_too_late_does_not_kill_a_process_that_takes_its_leave():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        with StopRequest(last=True):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stay_in_c():
    """About a second in one call that leaves Python's lock, as a backward pass does."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)


def send_soon(*numbers):
    """The signals, 0.1 s apart, from a thread; the list gets the time of the first one."""
    sent = []

    def send():
        for number in numbers:
            time.sleep(0.1)
            sent.append(time.monotonic())
            os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    return sent


def test_a_signal_has_come_when_it_came_and_not_when_python_got_to_it():
    with StopRequest() as stop:
        sent = send_soon(signal.SIGUSR1)
        stay_in_c()
        held = time.monotonic() - sent[0]
        assert stop.received == signal.SIGUSR1
    assert held > 0.2
    assert 0 <= stop.received_at - sent[0] < held / 2


def test_ctrl_c_after_another_signal_interrupts_although_python_handles_it_first():
    with StopRequest() as stop:
        with pytest.raises(KeyboardInterrupt):
            send_soon(signal.SIGTERM, signal.SIGINT), stay_in_c()
        assert stop.received == signal.SIGTERM


def test_who_had_the_wakeup_descriptor_still_gets_its_bytes_and_has_it_back():
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    reader.settimeout(10)
    before = signal.set_wakeup_fd(writer.fileno())
    try:
        with StopRequest():
            os.kill(os.getpid(), signal.SIGTERM)
            assert reader.recv(1) == bytes([signal.SIGTERM])
        assert signal.set_wakeup_fd(before) == writer.fileno()
        with StopRequest() as stop:  # and who takes it in the meantime keeps it
            signal.set_wakeup_fd(writer.fileno())
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.received == signal.SIGTERM
            assert reader.recv(1) == bytes([signal.SIGTERM])
        assert signal.set_wakeup_fd(before) == writer.fileno()
    finally:
        signal.set_wakeup_fd(before)
        reader.close(), writer.close()


def test_a_signal_for_a_forked_process_is_none_for_its_parent():
    """Else the time that the parent has after its own would have begun with this one."""
    with StopRequest() as stop:
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)  # ends by SIGKILL; it also has the writing end, which the block's end does not wait for
            finally:
                os._exit(0)
        time.sleep(0.5)
        now = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        assert stop.received_at >= now
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_ranks_agree():
    with StopRequest() as stop:
        assert stop.requested(lambda mine: True)  # another rank was asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested(lambda mine: mine)


def test_a_server_ends_by_sigint_only_and_so_does_what_it_starts(tmp_path):
    """Also where it was started as a shell's background job, and where the child has a handler of its own."""
    child = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
        "print('ready', flush=True); time.sleep(1.5); print('child ends', flush=True)"
    )
    parent = (
        "import subprocess, sys\n"
        "from perl_megatron.runtime.signals import leave_only_interrupt\n"
        "leave_only_interrupt()\n"
        f"try: subprocess.run([sys.executable, '-c', {child!r}]); print('parent waits', flush=True); input()\n"
        "except KeyboardInterrupt: print('interrupted', flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # noqa: PLW1509 - only a system call
    ) as process:
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGTERM)
        assert [process.stdout.readline() for _ in range(2)] == ["child ends\n", "parent waits\n"]
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
    assert process.returncode == 0


def test_processes_of_multiprocessing_do_not_let_sigterm_through_again(tmp_path):
    """vLLM's processes are such ones: where one got it, the trainer's weights found nobody."""
    script = tmp_path / "server.py"
    script.write_text(
        "import multiprocessing, signal\n"
        "from perl_megatron.runtime.signals import leave_only_interrupt\n"
        "def is_blocked():\n"
        "    return signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])\n"
        "def engine(answers, worker):\n"
        "    if worker is not None:\n"
        "        worker = multiprocessing.get_context('spawn').Process(target=engine, args=(answers, None))\n"
        "        worker.start(); worker.join()\n"
        "    answers.put(is_blocked())\n"
        "if __name__ == '__main__':\n"
        "    leave_only_interrupt()\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    answers = context.SimpleQueue()\n"
        "    process = context.Process(target=engine, args=(answers, 'worker')); process.start(); process.join()\n"
        "    print(answers.get(), answers.get(), is_blocked())\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout == "True True True\n"
