"""Requests as a server reads them, and answers of all kinds: exactly the rollouts, or a failure of the server."""

from __future__ import annotations

import base64
import copy
import io
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_checkpoint import make_images, make_policy, make_view

from perl_megatron.data.processor import PromptEncoder
from perl_megatron.rollout.engine import BANNED_LOGIT_BIAS, Sampling
from perl_megatron.rollout.server_answers import AnswerReader, ImageUrls, StaleWeights, request_body
from perl_megatron.rollout.server_client import ServerFailure
from perl_megatron.types import EncodedPrompt, Rollout, View

SAMPLING = Sampling(num_rollouts=2, temperature=0.7, top_p=0.9, max_tokens=4)
VERSIONS = {"run-3": 3, "run-4": 4}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    return PromptEncoder(make_policy(tmp_path_factory.mktemp("answers")), system_prompt="Think.")


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> View:
    return make_view(make_images(tmp_path_factory.mktemp("images"), [(28, 28), (100, 131)]), index=1)


@pytest.fixture(scope="module")
def prompt(encoder: PromptEncoder, view: View) -> EncodedPrompt:
    return encoder.encode(view)


@pytest.fixture(scope="module")
def reader(encoder: PromptEncoder) -> AnswerReader:
    return AnswerReader(encoder, SAMPLING, version_of=VERSIONS.get)


@pytest.fixture(scope="module")
def answer(encoder: PromptEncoder, prompt: EncodedPrompt) -> dict[str, Any]:
    """A good one, as JSON gives it: two rollouts, the second one first; one is cut, one ended its turn."""
    digit = encoder.tokenizer("7", add_special_tokens=False).input_ids[0]
    tokens = {0: [digit] * 4, 1: [digit, encoder.turn_end_id]}
    choices = [
        {
            "index": index,
            "token_ids": tokens[index],
            "finish_reason": "stop" if index else "length",
            "logprobs": {
                "content": [
                    {"token_id": token, "logprob": -0.5 * place - index} for place, token in enumerate(tokens[index])
                ]
            },
            "weight_versions": [{"start": 0, "end": len(tokens[index]), "version": "run-3"}],
        }
        for index in (1, 0)
    ]
    return {"request_id": "x", "prompt_token_ids": prompt.token_ids.tolist(), "choices": choices}


def read(reader: AnswerReader, answer: Any, view: View, prompt: EncodedPrompt) -> list[Rollout]:
    return reader.read(json.loads(json.dumps(answer)), view, prompt)


def test_an_image_arrives_with_the_same_pixels(encoder: PromptEncoder, prompt: EncodedPrompt) -> None:
    body = json.loads(json.dumps(request_body(encoder, prompt, SAMPLING, 1, ImageUrls(encoder))))
    assert body["token_ids"] == list(prompt.compact_ids)
    assert len(body["content_parts"]) == 2
    for part, key in zip(body["content_parts"], prompt.image_keys, strict=True):
        kind, _, data = part["url"].partition(",")
        assert (part["type"], kind) == ("image_url", "data:image/png;base64")
        np.testing.assert_array_equal(Image.open(io.BytesIO(base64.b64decode(data))), encoder.image(key))


def test_an_image_is_compressed_once_for_the_views_that_share_it(encoder: PromptEncoder, prompt: EncodedPrompt) -> None:
    key, kept, small = prompt.image_keys[0], ImageUrls(encoder), ImageUrls(encoder, cache_bytes=10)
    assert kept(key) is kept(key)
    assert small(key) is not small(key)
    assert small(key) == kept(key)


def test_sampling_is_what_the_trainer_means(encoder: PromptEncoder, prompt: EncodedPrompt) -> None:
    asked = request_body(encoder, prompt, SAMPLING, 1, ImageUrls(encoder))["sampling_params"]
    assert (asked["n"], asked["temperature"], asked["top_p"], asked["max_tokens"]) == (2, 0.7, 0.9, 4)
    assert asked["logit_bias"] == {str(token): BANNED_LOGIT_BIAS for token in encoder.banned_token_ids}
    assert asked["stop_token_ids"] == list(encoder.end_token_ids)
    greedy = Sampling(num_rollouts=1, temperature=0.0, top_p=0.5, max_tokens=4)
    assert request_body(encoder, prompt, greedy, 1, ImageUrls(encoder))["sampling_params"]["top_p"] == 1.0


def test_seeds_fit_and_differ(encoder: PromptEncoder, prompt: EncodedPrompt) -> None:
    """vLLM adds the number of the rollout, and takes no more than 63 bits."""
    bodies = [request_body(encoder, prompt, SAMPLING, seed, ImageUrls(encoder)) for seed in (*range(300), 2**63)]
    seeds = [body["sampling_params"]["seed"] for body in bodies]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**62 for seed in seeds)
    gaps = np.diff(sorted(seeds))
    assert gaps.min() > 1000  # neighbours would share streams
    again = request_body(encoder, prompt, SAMPLING, 5, ImageUrls(encoder))
    assert again["sampling_params"]["seed"] == seeds[5]


def test_a_good_answer(reader: AnswerReader, answer: Any, view: View, prompt: EncodedPrompt) -> None:
    first, second = read(reader, answer, view, prompt)
    assert (first.finish_reason, second.finish_reason) == ("length", "stop")
    assert (first.text, second.text) == ("7777", "7")
    assert first.token_ids.tolist() == answer["choices"][1]["token_ids"]
    assert second.logprob_rollout.tolist() == [-1.0, -1.5]
    for rollout in (first, second):
        assert rollout.view_index == 1
        assert (rollout.token_ids.dtype, rollout.logprob_rollout.dtype) == (np.int64, np.float32)
        assert rollout.weight_versions.tolist() == [3] * len(rollout.token_ids)


def test_each_token_has_the_version_of_its_span(
    reader: AnswerReader, answer: Any, view: View, prompt: EncodedPrompt
) -> None:
    answer = copy.deepcopy(answer)
    answer["choices"][1]["weight_versions"] = [
        {"start": 0, "end": 1, "version": "run-3"},
        {"start": 1, "end": 4, "version": "run-4"},
    ]
    assert read(reader, answer, view, prompt)[0].weight_versions.tolist() == [3, 4, 4, 4]


@pytest.mark.parametrize("version", ["default", "run-5", "another-3"])
def test_foreign_weights_are_stale(
    reader: AnswerReader, answer: Any, view: View, prompt: EncodedPrompt, version: str
) -> None:
    """Also where they sampled the last token only."""
    answer = copy.deepcopy(answer)
    answer["choices"][0]["weight_versions"] = [
        {"start": 0, "end": 1, "version": "run-3"},
        {"start": 1, "end": 2, "version": version},
    ]
    with pytest.raises(StaleWeights, match=version):
        read(reader, answer, view, prompt)


def first(answer: Any) -> Any:
    """Of the choices, the one that was cut."""
    return answer["choices"][1]


def score(answer: Any) -> Any:
    """Of that choice's first token."""
    return first(answer)["logprobs"]["content"][0]


def set_tokens(answer: Any, tokens: list[Any]) -> None:
    """Everything else of that choice goes with them."""
    scores = [{"token_id": token, "logprob": -1.0} for token in tokens]
    span = {"start": 0, "end": len(tokens), "version": "run-3"}
    first(answer).update(token_ids=tokens, logprobs={"content": scores}, weight_versions=[span])


OTHER_TOKENS, NO_LOG_PROBABILITY = "token ids that the policy does not have", "log-probabilities that are none"
WRONG: dict[str, tuple[Callable[[Any], object], str]] = {
    "nothing": (lambda answer: answer.clear(), "cannot be read: KeyError"),
    "another prompt": (lambda answer: answer["prompt_token_ids"].append(1), "read another prompt"),
    "no prompt": (lambda answer: answer.update(prompt_token_ids=None), "read another prompt"),
    "no choices": (lambda answer: answer.update(choices=[]), "returned 0 rollouts instead of 2"),
    "a choice twice": (lambda answer: answer["choices"].__setitem__(0, first(answer)), "numbered 0, 0"),
    "choices without numbers": (lambda answer: first(answer).pop("index"), "cannot be read"),
    "no tokens": (lambda answer: set_tokens(answer, []), "a response of 0 tokens"),
    "tokens as text": (lambda answer: first(answer).update(token_ids="7777"), OTHER_TOKENS),
    "a token of another kind": (lambda answer: set_tokens(answer, [7, 7, True, 7]), OTHER_TOKENS),
    "a negative token": (lambda answer: set_tokens(answer, [7, -1, 7, 7]), OTHER_TOKENS),
    "a token beyond the vocabulary": (lambda answer: set_tokens(answer, [7, 7, 7, 10**6]), OTHER_TOKENS),
    "cut too early": (lambda answer: set_tokens(answer, [7] * 3), "a response of 3 tokens with 'length'"),
    "too long": (lambda answer: set_tokens(answer, [7] * 5), "a response of 5 tokens with 'length'"),
    "another end": (lambda answer: first(answer).update(finish_reason="stop"), "4 tokens with 'stop'"),
    "an end that is none": (lambda answer: answer["choices"][0].update(finish_reason="abort"), "with 'abort'"),
    "an end in a list": (lambda answer: first(answer).update(finish_reason=["length"]), "with ['length']"),
    "log-probabilities of others": (lambda answer: score(answer).update(token_id=1), "of other tokens"),
    "a log-probability too few": (lambda answer: first(answer)["logprobs"]["content"].pop(), "of other tokens"),
    "a probability above one": (lambda answer: score(answer).update(logprob=0.1), NO_LOG_PROBABILITY),
    "no number": (lambda answer: score(answer).update(logprob=math.nan), NO_LOG_PROBABILITY),
    "minus infinity": (lambda answer: score(answer).update(logprob=-math.inf), NO_LOG_PROBABILITY),
    "no float32": (lambda answer: score(answer).update(logprob=-1e39), NO_LOG_PROBABILITY),
    "no float": (lambda answer: score(answer).update(logprob=-(10**400)), "cannot be read: OverflowError"),
    "no log-probabilities": (lambda answer: first(answer).update(logprobs=None), "cannot be read: TypeError"),
    "no versions": (lambda answer: first(answer).update(weight_versions=[]), "which weights sampled some"),
    "a token without version": (
        lambda answer: first(answer)["weight_versions"][0].update(end=3),
        "which weights sampled some",
    ),
    "an endless span": (
        lambda answer: first(answer)["weight_versions"][0].update(start=math.inf),
        "cannot be read: OverflowError",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_not_the_rollouts_that_were_asked_for_is_refused(
    reader: AnswerReader, answer: Any, view: View, prompt: EncodedPrompt, kind: str
) -> None:
    answer, (spoil, says) = copy.deepcopy(answer), WRONG[kind]
    spoil(answer)
    with pytest.raises(ServerFailure) as caught:
        read(reader, answer, view, prompt)
    assert says in str(caught.value)
    assert not isinstance(caught.value, StaleWeights)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(garbage=JSON)
def test_garbage_is_a_failure_of_the_server(
    reader: AnswerReader, view: View, prompt: EncodedPrompt, garbage: Any
) -> None:
    with pytest.raises(ServerFailure):
        reader.read(garbage, view, prompt)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all parts of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_spoilt_answer_gives_the_right_rollouts_or_a_failure(
    reader: AnswerReader, answer: Any, view: View, prompt: EncodedPrompt, data: st.DataObject
) -> None:
    """One or two parts are replaced, left out or doubled, anywhere."""
    good = reader.read(answer, view, prompt)
    spoilt = copy.deepcopy(answer)
    for _ in range(data.draw(st.integers(1, 2), "changes")):
        every = [place for place in places(spoilt) if place and not (place[0] == "prompt_token_ids" and len(place) > 1)]
        if not every:
            break
        place = data.draw(st.sampled_from(every), "place")
        parent = spoilt
        for key in place[:-1]:
            parent = parent[key]
        change = data.draw(st.sampled_from(["replace", "remove", "double"]), "change")
        if change == "replace":
            parent[place[-1]] = data.draw(JSON, "by")
        elif change == "remove":
            del parent[place[-1]]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[place[-1]]))
    try:
        rollouts = reader.read(spoilt, view, prompt)
    except ServerFailure:
        return
    assert len(rollouts) == len(good)
    for rollout, expected in zip(rollouts, good, strict=True):
        length = len(rollout.token_ids)
        assert rollout.view_index == expected.view_index
        assert 1 <= length <= SAMPLING.max_tokens
        assert (rollout.token_ids >= 0).all()
        assert (rollout.token_ids < reader.encoder.vocabulary_size).all()
        assert rollout.logprob_rollout.shape == rollout.weight_versions.shape == (length,)
        assert np.isfinite(rollout.logprob_rollout).all()
        assert (rollout.logprob_rollout <= 1e-3).all()
        assert set(rollout.weight_versions.tolist()) <= set(VERSIONS.values())
        ended = rollout.token_ids[-1] in reader.encoder.end_token_ids
        assert rollout.finish_reason == ("stop" if ended else "length")
        assert rollout.text == reader.encoder.decode(rollout.token_ids)
