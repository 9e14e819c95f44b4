"""Thirty rows in the form of Mantis-Instruct, and a scripted language model and policy that answer by rules."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image
from scripted_endpoint import Said, asked_text

from perl_megatron.config.load import load_sections
from perl_megatron.preparation.pipeline import STAGES
from perl_megatron.preparation.settings import PreparationSettings

OPEN = [
    ("How many of these pictures show something round?", "two"),
    ("What colour is the ball in the second image?", "red"),
    ("Which animal is in both pictures?", "a dog"),
    ("Where were these photos taken?", "at the beach"),
    ("IMPOSSIBLE: what do you feel when you see this?", "joy"),
    ("OFFTRACK: what is the difference between them?", "the hat"),
    ("GARBAGE: what is the weather like in all of them?", "sunny"),
    ("LOST: what is the man in image 2 holding there?", "a cup"),
    ("What do the people on the pictures wear?", "coats"),
    ("Which season is it in these pictures?", "winter"),
    ("What is the number on both shirts?", "7"),
    ("What are the children doing in them?", "playing"),
]
CHOICE = [
    ("Which one is darker?\n(A) the first image\n(B) the second image", "(B)"),
    ("Is there a cat in both?\nOptions:\nA. yes\nB. no\nAnswer with the option's letter.", "A"),
    ("How many dogs are there in all images? (A) 1 (B) 2 (C) 3", "The answer is (C)."),
    ("What is common to these images?\n(A) a tree\n(B) a car\n(C) a house\n(D) a dog", "a car"),
    ("Do the images show the same place?\n(A) Yes\n(B) No", "(A) Yes"),
    ("Which sport is played in these photos? (A) tennis, (B) golf, (C) chess", "B"),
    ("What is the total of the numbers shown?\n(A) 10\n(B) 11\n(C) 12\n(D) 13", "(D)"),
    ("Are there more people than chairs?\n(A) yes\n(B) no\n(C) as many", "C"),
    ("Does image 1 show the older car?\n(A) yes\n(B) no", "A"),
    ("What is the next step after these images?\n(A) stir\n(B) winter", "(B) winter"),
]


def png(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A picture of (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def row(name: str, text: str, answer: str, images: list[bytes]) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": "<image>" * len(images) + "\n" + text},
        {"role": "assistant", "content": answer},
    ]
    return {"id": name, "images": [{"bytes": each, "path": None} for each in images], "conversation": turns}


def bad_rows() -> list[dict[str, Any]]:
    """Eight rows, each of which breaks another rule."""
    good = [png(900), png(901)]
    mismatch = row("mismatch", "Which one is it of the two?", "this", good)
    mismatch["conversation"][0]["content"] = "<image><image><image> Which one is it of the two?"
    first = row("choice-0", *CHOICE[0], [png(100), png(101)])
    return [
        row("single", "What is on this picture?", "a cat", good[:1]),
        row("many", "What is on these pictures?", "cats", [png(k) for k in range(910, 919)]),
        mismatch,
        row("long", "Tell me about these pictures.", "Once upon a time " * 20, good),
        row("script", "这两张图片有什么不同之处呢？请告诉我。", "颜色", good),
        row("stranger", "Which is it? (A) red (B) blue", "green", good),
        {**first, "id": "copy"},
        row("corrupt", "What is on these two pictures?", "cats", [png(920), png(921)[:100]]),
    ]


def rows() -> list[dict[str, Any]]:
    """Thirty: ten with options, twelve open ones, eight bad ones."""
    choice = [
        row(f"choice-{k}", text, answer, [png(100 + 10 * k + image) for image in range(2 + k % 3)])
        for k, (text, answer) in enumerate(CHOICE)
    ]
    open_ones = [
        row(f"open-{k}", text, answer, [png(500 + 10 * k + image) for image in range(2 + k % 2)])
        for k, (text, answer) in enumerate(OPEN)
    ]
    return [*choice, *open_ones, *bad_rows()]


def write_table(folder: Path) -> Path:
    """The thirty rows as parquet, in a subfolder as the published set has one for each subset."""
    target = folder / "multi_vqa" / "train-00000-of-00001.parquet"
    target.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows()), target)
    return folder


def settings(source: Path, url: str, *overrides: str) -> PreparationSettings:
    given = [
        f"source.path={source}",
        *(f"{section}.url={url}" for section in ("endpoint", "policy_endpoint")),
        *(f"{section}.retries=0" for section in ("endpoint", "policy_endpoint")),
        *(f"{section}.concurrency=1" for section in ("endpoint", "policy_endpoint")),
        "difficulty.max_response_tokens=64",
        "resample.histogram=1,1,1,1",
        "resample.size=12",
    ]
    return load_sections(PreparationSettings, None, [*given, *overrides])[0]


def answer_by_rules(body: dict[str, Any]) -> Said:
    """The language model and the policy."""
    text = asked_text(body)
    form = body.get("response_format")
    if form is None:
        return _policy(body, text)
    user = text[text.rindex("Question:\n") :]
    if form["json_schema"]["name"] == "label":
        stem, options = user.split("\n\nOptions:\n")
        by_place = re.search(r"(first|second) image|image \d", stem + options) is not None
        return _json(should_change=by_place, is_multichoice_images="the first image" in options)
    question, answer = user.removeprefix("Question:\n").split("\n\nRight answer:\n")
    if question.find("GARBAGE") >= 0:
        return Said(texts=("I would rather not say.",))
    reply = {
        "possible": "IMPOSSIBLE" not in question,
        "question": question.replace("[IMAGE 1]", "") if "LOST" in question else question,
        "options": [answer, "something else", "neither of these"],
        "answer": "not listed" if "OFFTRACK" in question else answer,
        "question_type": "ReferenceComparison" if "image" in question.replace("[IMAGE", "") else "Other",
    }
    return _json(**reply)


def _policy(body: dict[str, Any], text: str) -> Said:
    """Right in some of the n responses; which share, the question decides."""
    letters = re.findall(r"^\(([A-Z])\)", text, re.MULTILINE)
    share = hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % 4
    num_right = round(share / 3 * body["n"])
    truth = TRUTH[re.sub(r"\s+", " ", text.replace("[image]", "").split("\\boxed{}.")[1]).split("(A)")[0].strip()]
    options = dict(re.findall(r"^\(([A-Z])\) (.*)$", text, re.MULTILINE))
    right = next(letter for letter, option in options.items() if truth in (letter, option))
    wrong = next(letter for letter in letters if letter != right)
    texts = [f"<think>so</think>\\boxed{{{right if k < num_right else wrong}}}" for k in range(body["n"])]
    return Said(texts=tuple(texts))


def _truths() -> dict[str, str]:
    letters = {"The answer is (C).": "C", "a car": "B", "(A) Yes": "A", "(B) winter": "B"}
    truths = {
        " ".join(re.split(r"\(A\)|Options:", text)[0].split()): letters.get(answer, answer.strip("()"))
        for text, answer in CHOICE
    }
    return truths | {" ".join(text.split()): answer for text, answer in OPEN}


TRUTH = _truths()


def _json(**values: object) -> Said:
    return Said(texts=(json.dumps(values),))


def contents(folder: Path) -> dict[str, bytes]:
    """All files of the stages."""
    names = [f"{number:02d}_{name}" for number, name in enumerate(STAGES, start=1)]
    files = [path for path in folder.iterdir() if path.name.split(".")[0] in (*names, "records", "counts")]
    return {path.name: path.read_bytes() for path in sorted(files)}


def copied_until(stage: str, finished: Path, folder: Path) -> Path:
    """The folder of a run that has finished all stages before ``stage``, without its cached replies."""
    before = STAGES[: STAGES.index(stage)]
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("*.jsonl", "replies", "replaced", ".lock"))
    manifest = json.loads((finished / "manifest.json").read_text())
    manifest["stages"] = {name: manifest["stages"][name] for name in before}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for number, name in enumerate(before, start=1):
        for path in finished.glob(f"{number:02d}_{name}.*"):
            shutil.copy(path, folder)
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
