"""TensorBoard's events, written where they are logged.

torch's SummaryWriter writes in a thread, which dies where the disk is full, with half a record at the end of its file,
behind which TensorBoard reads nothing.
"""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from perl_megatron.observability.append_file import AppendFile
from perl_megatron.observability.full_disk import FullDisk

FORMAT = "brain.Event:2"
_numbers = itertools.count()


class EventFile:
    """A new file of events.

    Args:
        folder: of all event files of the run; made where it is not there.
        disk: is told where the disk is full.
        purge_step: events of this step and later ones in older files do not count any more; None: all do.
    """

    def __init__(self, folder: Path, disk: FullDisk, *, purge_step: int | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, and two may be of the same second.
        own = f"{os.getpid()}.{next(_numbers):06d}"
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{own}"
        self._file = AppendFile(folder / name, disk, what="rows of TensorBoard")
        begin = [Event(wall_time=time.time(), file_version=FORMAT)]
        if purge_step is not None:
            log = SessionLog(status=SessionLog.START)
            begin.append(Event(wall_time=time.time(), step=purge_step, session_log=log))
        self._file.append(_records(begin), count=0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one row now."""
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        events = [Event(wall_time=time.time(), step=step, summary=Summary(value=[value])) for value in values]
        self._file.append(_records(events))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _records(events: Iterable[Event]) -> bytes:
    content = io.BytesIO()
    writer = RecordWriter(content)
    for event in events:
        writer.write(event.SerializeToString())
    return content.getvalue()
