"""A step whose groups were drawn, or some of them, when its run had to end: a file that the resumed run goes on from.

The file belongs to the checkpoint of the step's beginning. It is no part of it: that may have been written long before,
and without the file, or with one that is damaged, the groups are only drawn again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perl_megatron.data.group_state import group_from_json, group_to_json, record_from_json, record_to_json
from perl_megatron.drawn import Drawn, DrawnQuestion
from perl_megatron.durable import replace_file
from perl_megatron.rollout.cache_use import CacheUse
from perl_megatron.types import EncodedPrompt, View

logger = logging.getLogger(__name__)

FORMAT = 1
PLAIN = ("step", "refills", "exhausted", "round_left", "is_complete")
POSITION = ("draw_index", "drawn_step", "refill", "problem", "decision", "reason")


@dataclass(frozen=True)
class StepInProgress:
    """What a step has drawn so far, all of it scored and decided about."""

    drawn: Drawn
    begins: dict[str, Any]
    """The sampler's position when the step began: the checkpoint's."""
    ends: dict[str, Any]
    """Its position after what was drawn."""


def write_step(path: Path, left: StepInProgress) -> None:
    """Write the file whole or not at all. Raises OSError where that is not possible."""
    content = json.dumps({"begins": left.begins, "ends": left.ends, "drawn": drawn_to_json(left.drawn)})
    text = json.dumps({"format": FORMAT, "sha256": hashlib.sha256(content.encode()).hexdigest(), "content": content})
    replace_file(path, text.encode())


def read_step(
    path: Path, *, step: int, begins: dict[str, Any], encode: Callable[[View], EncodedPrompt]
) -> StepInProgress | None:
    """What was written of ``step``; None where there is nothing, or it does not belong to this beginning of it.

    UserError as ``encode`` raises it (an image that is gone).
    """
    if not path.is_file():
        return None
    try:
        outer = json.loads(path.read_text(encoding="utf-8"))
        if outer["format"] != FORMAT or hashlib.sha256(outer["content"].encode()).hexdigest() != outer["sha256"]:
            raise ValueError("it is not what was written")
        content = json.loads(outer["content"])
        belongs = (content["drawn"]["step"], content["begins"]) == (step, begins)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be read (%s): the groups of step %d are drawn again", path, error, step + 1)
        return None
    if not belongs:
        return None
    return StepInProgress(drawn_from_json(content["drawn"], encode), content["begins"], content["ends"])


def drawn_to_json(drawn: Drawn) -> dict[str, Any]:
    """All that ``Drawn`` holds before it is trained on."""
    questions = [
        {
            **{name: getattr(question, name) for name in POSITION},
            "record": None if question.group is not None else record_to_json(question.record),
            "group": None if question.group is None else group_to_json(question.group),
        }
        for question in drawn.questions
    ]
    plain = {name: getattr(drawn, name) for name in PLAIN}
    return {**plain, "cache_use": asdict(drawn.cache_use), "questions": questions}


def drawn_from_json(state: dict[str, Any], encode: Callable[[View], EncodedPrompt]) -> Drawn:
    """The inverse; views and prompts are made anew."""
    questions = []
    for saved in state["questions"]:
        group = None if saved["group"] is None else group_from_json(saved["group"], encode)
        record = record_from_json(saved["record"]) if group is None else group.record
        questions.append(DrawnQuestion(record=record, group=group, **{name: saved[name] for name in POSITION}))
    plain = {name: state[name] for name in PLAIN}
    return Drawn(questions=questions, cache_use=CacheUse(**state["cache_use"]), **plain)
