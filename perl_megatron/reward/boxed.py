"""What a response looks like: its format, and its boxed answer. Everything here takes time linear in the text."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\\{1,2}boxed\{|\\.|[{}]", re.DOTALL)
"""An opening box, any other escaped character (so that ``\\{`` is no brace), or a brace."""


def follows_format(text: str) -> bool:
    r"""Whether all of ``text`` matches ``<think>.*</think>.*\boxed{.*}.*`` with ``.`` matching newlines.

    Each piece is searched for from where the piece before it first ends: a match exists exactly when this one does. A
    backtracking regular expression takes quadratic time on repeated tags.
    """
    if not text.startswith("<think>"):
        return False
    end = len("<think>")
    for piece in ("</think>", "\\boxed{", "}"):
        start = text.find(piece, end)
        if start < 0:
            return False
        end = start + len(piece)
    return True


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{…}`` whose braces balance, or None; of nested boxes, the inner one."""
    open_braces: list[int | None] = []  # where a box's content starts; None for any other brace
    best: tuple[int, int] | None = None
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token.endswith("boxed{"):
            open_braces.append(match.end())
        elif token == "{":
            open_braces.append(None)
        elif token == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and (best is None or start > best[0]):
                best = start, match.start()
    return None if best is None else text[best[0] : best[1]]
