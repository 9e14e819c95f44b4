"""Network addresses of this machine, and where others are."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit


def address_towards(host: str) -> str:
    """The address of this machine's interface on the way to ``host``, numeric; nothing is sent.

    Raises:
        OSError: the host is unknown, or there is no way to it.
    """
    found = _resolve(host, 9)
    # The older family where there are both: vLLM's rendezvous binds no other.
    family, _, _, _, target = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host`` (a name or a numeric address); False for what cannot be resolved."""
    try:
        addresses = {str(entry[4][0]) for entry in _resolve(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in addresses)


def host_of(url: str) -> str:
    """The host of an http(s) address; ValueError for anything else."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ValueError(f"{url!r} is not an address like http://host:8000")
    _ = parts.port  # ValueError for one that is none
    return parts.hostname


def _resolve(host: str, port: int | None) -> list[tuple[Any, ...]]:
    """What ``socket.getaddrinfo`` finds; OSError also for what cannot be a name, where it raises UnicodeError."""
    try:
        return list(socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM))
    except UnicodeError as error:
        raise OSError(f"{host!r} cannot be the name of a host: {error}") from error
