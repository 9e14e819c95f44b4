"""Addresses of this machine, as the kernel has them, and the hosts of URLs."""

from __future__ import annotations

import socket

import pytest

from perl_megatron.launch.ports import family_of, free_port
from perl_megatron.runtime.addresses import address_towards, host_of, is_loopback

UNRESOLVABLE = ["no-such-host.invalid", "x" * 70, "two..dots", ""]


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


LOOPBACK = ["127.0.0.1", pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here"))]


@pytest.mark.parametrize("host", [*LOOPBACK, "127.8.9.10", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "fe80::1%lo", *UNRESOLVABLE])
def test_what_others_may_reach_is_not_loopback(host: str) -> None:
    """Also what cannot be resolved: nothing is known of it then."""
    assert not is_loopback(host)


@pytest.mark.parametrize("host", UNRESOLVABLE[:3])
def test_there_is_no_way_to_an_unknown_host(host: str) -> None:
    with pytest.raises(OSError):
        address_towards(host)


@pytest.mark.parametrize("address", LOOPBACK)
def test_the_way_to_loopback_is_loopback_and_a_port_there_is_free(address: str) -> None:
    assert address_towards(address) == address
    port = free_port(address)
    family = family_of(address)
    with socket.create_server((address, port), family=family), pytest.raises(OSError):
        socket.create_server((address, port), family=family)


@pytest.mark.parametrize("is_first", [True, False])
def test_of_two_families_the_older_one_is_taken(monkeypatch: pytest.MonkeyPatch, is_first: bool) -> None:
    """vLLM's rendezvous binds no other."""
    found = [(socket.AF_INET6, 2, 17, "", ("::1", 9, 0, 0)), (socket.AF_INET, 2, 17, "", ("127.0.0.1", 9))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found[::-1] if is_first else found)
    assert address_towards("both") == "127.0.0.1"


@pytest.mark.parametrize(
    ("address", "family"),
    [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6), ("fe80::1%lo", socket.AF_INET6)],
)
def test_families(address: str, family: socket.AddressFamily) -> None:
    assert family_of(address) == family


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1"),
        ("https://node7.cluster:443/", "node7.cluster"),
        ("http://[::1]:8000", "::1"),
        ("http://node7", "node7"),
    ],
)
def test_host_of(url: str, host: str) -> None:
    assert host_of(url) == host


@pytest.mark.parametrize(
    "url",
    [
        *("127.0.0.1:8000", "node7", "", "ftp://node7", "http://", "http://:8000", "http://node7:many"),
        *("http://node7:70000", "http://user@node7", "http://node7?a=b", "http://node7#a"),
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        host_of(url)
