"""Replies on the disk, by the hash of what was asked. Any number of processes may read and write one folder."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from perl_megatron.chat.messages import ChatReply
from perl_megatron.errors import UserError

_FORMAT = 1


class ReplyCache:
    """One small JSON file for each reply. Errors are not kept; a file that is not whole is as good as none.

    Raises ``UserError`` where the folder cannot be made or written.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._replies = TypeAdapter(ChatReply)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._cannot_write(error) from error

    def get(self, digest: str) -> ChatReply | None:
        """The reply to the request of this digest, or None."""
        try:
            content = json.loads(self._path(digest).read_bytes())
            if content["format"] != _FORMAT or content["digest"] != digest:
                return None
            reply = self._replies.validate_python(content["reply"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError, ValidationError):
            return None
        return replace(reply, cached=True)

    def put(self, digest: str, reply: ChatReply) -> None:
        """Keep a reply; the file appears whole or not at all."""
        assert reply.error is None
        content = {"format": _FORMAT, "digest": digest, "reply": asdict(reply)}
        path = self._path(digest)
        temporary = None
        try:
            path.parent.mkdir(exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file)
            os.replace(temporary, path)
        except OSError as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            raise self._cannot_write(error) from error

    def _path(self, digest: str) -> Path:
        return self._folder / digest[:2] / f"{digest}.json"

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(
            f"the cache of replies cannot be written: {error.strerror}",
            where=f"endpoint.cache = {self._folder}",
            fix="choose a folder that can be written, on a disk with free space",
        )
