"""Answers to views that are on the disk after each chunk, so that an interrupted evaluation can go on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from perl_megatron.checkpoint.manifest import on_rank_zero
from perl_megatron.evaluation.asking import Asker, Reply
from perl_megatron.evaluation.output_log import OutputLog, question_digest
from perl_megatron.rollout.engine import Sampling
from perl_megatron.runtime.collective import gather_objects
from perl_megatron.types import View

Key = tuple[str, tuple[int, ...], str]
"""Record, image order, digest of what is asked."""


class KeptAnswers:
    """Asks ``asker`` what the log does not answer yet. All ranks make it and ask it together; rank 0 has the log.

    Asked again is what got no answer, what has too few rollouts, and a view whose text or images are others now.
    """

    def __init__(self, asker: Asker, log: OutputLog):
        self.name = asker.name
        self._asker, self._log = asker, log
        self._known: dict[Key, dict[int, Reply]] = {}
        read: list[dict[str, Any]] = []
        on_rank_zero(lambda: read.extend(log.read()), what="the answers")
        for row in gather_objects(read)[0]:
            key = row["record"], tuple(row["order"]), row["question_digest"]
            reply = Reply(row["response"], row["finish_reason"], row["problem"])
            self._known.setdefault(key, {})[row["rollout"]] = reply

    def ask(self, views: Sequence[View], sampling: Sampling) -> list[list[Reply]]:
        """As every ``Asker``; returns when the new answers are on the disk."""
        waiting = [view for view in views if not self._is_known(view, sampling)]
        asked = self._asker.ask(waiting, sampling) if waiting else []
        rows = []
        for view, replies in zip(waiting, asked, strict=True):
            self._known[_key(view)] = dict(enumerate(replies))
            rows += [_row(view, number, reply) for number, reply in enumerate(replies)]
        if rows:
            on_rank_zero(partial(self._log.append, rows), what="the answers")
        return [[self._known[_key(view)][number] for number in range(sampling.num_rollouts)] for view in views]

    def _is_known(self, view: View, sampling: Sampling) -> bool:
        replies = self._known.get(_key(view), {})
        wanted = [replies.get(number) for number in range(sampling.num_rollouts)]
        return all(reply is not None and reply.finish_reason not in ("error", "not asked") for reply in wanted)


def _key(view: View) -> Key:
    return view.record_id, view.order, question_digest(view)


def _row(view: View, number: int, reply: Reply) -> dict[str, Any]:
    return {
        "record": view.record_id,
        "order": list(view.order),
        "question_digest": question_digest(view),
        "rollout": number,
        "response": reply.text,
        "finish_reason": reply.finish_reason,
        "problem": reply.problem,
    }
