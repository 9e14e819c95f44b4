"""All gloo process groups of a process share one device: its socket, and the thread that waits at it.

torch makes a device for each group. megatron-core has some fifty groups, and a device's thread wakes up a hundred times
a second whether there is anything or not (gloo's `transport/tcp/loop.cc`): with four ranks on two cores that is a tenth
of their time.
"""

from __future__ import annotations

import functools
import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

THREADS = 2
"""Of a group, for each of its devices; as torch has it."""


def install() -> None:
    """Share from now on; groups that there are keep their devices."""
    gloo: Any = dist.ProcessGroupGloo  # its stub knows no options
    create = gloo.__init__

    @functools.wraps(create)
    def shared(
        self: dist.ProcessGroupGloo,
        store: dist.Store,
        rank: int,
        size: int,
        options: Any = None,
        *,
        timeout: timedelta = dist.default_pg_timeout,
    ) -> None:
        if isinstance(options, timedelta):  # either may be the fourth
            options, timeout = None, options
        if options is None:
            options = gloo._Options()
            options._devices = list(_devices(os.getpid(), os.environ.get("GLOO_SOCKET_IFNAME", "")))
            options._timeout = timeout
            options._threads = THREADS * len(options._devices)
        create(self, store, rank, size, options)

    gloo.__init__ = shared


@functools.cache
def _devices(process: int, interfaces: str) -> tuple[Any, ...]:
    """On the interfaces that the user named, or where the machine's name leads, as torch's own.

    By process, as the threads of a device are not there in a fork.
    """
    if not interfaces:
        return (dist.ProcessGroupGloo.create_default_device(),)
    return tuple(dist.ProcessGroupGloo.create_device(interface=name) for name in interfaces.split(","))
