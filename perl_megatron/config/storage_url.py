"""Addresses of databases as they are shown: without their password."""

from __future__ import annotations

import re

_PASSWORD = re.compile(r"(?<=://)(?P<user>[^:/@\s]*):[^@\s]*@|(?<=[?&])(?P<key>pass(?:word|wd)?|pwd)=[^&\s]*")


def without_password(text: str) -> str:
    """The text, in which `***` stands for the password of every address (`scheme://user:PASSWORD@…`, `?password=…`)."""
    return _PASSWORD.sub(lambda found: f"{found['key']}=***" if found["key"] else f"{found['user']}:***@", text)
