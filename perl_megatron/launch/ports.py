"""TCP ports of the rendezvous."""

from __future__ import annotations

import errno
import socket

from perl_megatron.errors import UserError

HOST = "127.0.0.1"


def free_port(address: str = HOST) -> int:
    """A port of this machine's numeric ``address`` that nobody listens on right now."""
    with socket.socket(family_of(address), socket.SOCK_STREAM) as candidate:
        candidate.bind((address, 0))
        return candidate.getsockname()[1]


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
