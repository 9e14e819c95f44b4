"""A port that was found is nobody else's, until its process has ended."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from perl_megatron.launch import ports

HOLDER = """
import sys
from perl_megatron.launch import ports
ports.PORTS = list(map(int, sys.argv[1:]))
print(ports.free_port(), ports.free_port(), flush=True)
sys.stdin.read()
"""


def test_no_port_is_found_twice_and_none_is_one_that_the_kernel_gives_away() -> None:
    found = [ports.free_port() for _ in range(100)]
    assert len(set(found)) == 100
    first = ports._first_ephemeral()
    assert all(port < first for port in found) or first <= ports.PORTS.start


@pytest.mark.skipif(ports._first_ephemeral() < ports.PORTS.stop, reason="the kernel leaves no such ports")
def test_what_another_process_has_found_is_not_found_until_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four ports another process has two, and one is listened on."""
    few = [ports.free_port() for _ in range(4)]
    for _ in few:
        ports._reserved.pop().close()
    monkeypatch.setattr(ports, "PORTS", few)
    with socket.create_server((ports.HOST, few[0])):
        command = [sys.executable, "-c", HOLDER, *map(str, few)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            others = set(map(int, holder.stdout.readline().split()))
            mine = ports.free_port()
            assert {mine, *others} == set(few[1:])
            assert ports.free_port() >= ports._first_ephemeral()  # none is left
            holder.kill()
        assert {ports.free_port(), ports.free_port()} == others
