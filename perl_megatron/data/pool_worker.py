"""The process of a ``WorkerPool``: applies one function to what it is sent, until nothing more can come.

It is started by this file's ``main`` and not by `multiprocessing`, which would import the trainer's main module, and
torch with it, once more.
"""

from __future__ import annotations

import os
import signal
import traceback
from multiprocessing.connection import Connection

from perl_megatron.errors import UserError


def main(file_descriptor: int) -> None:
    """Answer each item with (kind, value): 'value', 'refused' (a UserError) or 'failed' (a traceback's text)."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGUSR1,
    ):  # a run that is asked to stop still finishes its step
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(file_descriptor)
    try:
        function = connection.recv()
        connection.send("ready")
        while True:
            item = connection.recv()
            try:
                outcome = ("value", function(item))
            except UserError as error:
                outcome = ("refused", error)
            except Exception:
                outcome = ("failed", traceback.format_exc())
            connection.send(outcome)
    except (EOFError, OSError):
        os._exit(0)  # the pool is closed, or its process ended
