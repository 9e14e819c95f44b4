"""TCP ports of the rendezvous."""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

from perl_megatron.errors import UserError

HOST = "127.0.0.1"
PORTS = range(10_000, 20_000)
"""Most ports that something has by convention are lower, and Slurm jobs meet at higher ones (`slurm.FIRST_PORT`)."""
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""The first and the last port that the kernel gives to whoever asks for any port."""
_reserved: list[socket.socket] = []


def free_port(address: str = HOST) -> int:
    """A port of this machine's numeric ``address`` that nobody listens on right now.

    Nobody else comes upon it before the caller, or a process that it starts, listens there: it is below the ports that
    the kernel gives to connections and to listeners without a port of their own, and it is this process's until its
    end, as far as processes ask here. Only where the kernel leaves no ports below its own, it gives one of those.
    """
    end = _first_ephemeral()
    choices = [port for port in PORTS if port < end]
    for port in random.SystemRandom().sample(choices, min(len(choices), 200)):
        if _reserve(port) and _is_free(address, port):
            return port
    with socket.socket(family_of(address), socket.SOCK_STREAM) as candidate:
        candidate.bind((address, 0))
        return candidate.getsockname()[1]


def _first_ephemeral() -> int:
    try:
        return int(EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def _reserve(port: int) -> bool:
    """Whether no process has reserved the port; then this one has, to its end.

    By a name among Linux's abstract sockets: it is unique wherever the port is (in one network namespace), no file, and
    gone with its process, however that ends.
    """
    mark = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        mark.bind(f"\0perl-megatron-port-{port}")
    except OSError:
        mark.close()
        return False
    _reserved.append(mark)
    return True


def _is_free(address: str, port: int) -> bool:
    with socket.socket(family_of(address), socket.SOCK_STREAM) as candidate:
        try:
            candidate.bind((address, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
    return True


def family_of(address: str) -> socket.AddressFamily:
    """Of a numeric address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def require_free_port(port: int) -> None:
    """UserError where the port is not a port, is in use, or may not be used."""
    where = f"--master-port {port}"
    fix = "choose another port, or leave it out: a free one is then found"
    if not 1 <= port <= 65535:
        raise UserError(f"{port} is not a port (1 to 65535)", where=where, fix=fix)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as candidate:
        # As torch's store binds it: a port whose last connection is only fading away counts as free.
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind(("", port))
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
            raise UserError(f"port {port} {reason}", where=where, fix=fix) from error
