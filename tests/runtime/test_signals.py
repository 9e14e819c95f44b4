import os
import signal

import pytest

from perl_megatron.runtime.signals import StopRequest


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


def test_ranks_agree():
    with StopRequest() as stop:
        assert stop.requested(lambda mine: True)  # another rank was asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested(lambda mine: mine)
