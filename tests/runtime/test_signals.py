import os
import signal

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


def test_ranks_agree():
    with StopRequest() as stop:
        assert stop.requested(lambda mine: True)  # another rank was asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested(lambda mine: mine)
