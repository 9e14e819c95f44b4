"""What each fault makes of a prompt, read back as text, images and positions."""

from dataclasses import replace

import numpy as np
import pytest

from perl_megatron.data.processor import MERGE_SIZE
from perl_megatron.model.mrope import position_ids
from perl_megatron.triage.cases import Case, ImageInput, ModelInput, collapse
from perl_megatron.triage.dump import read_rollouts
from perl_megatron.triage.image_changes import order_changes, pixel_changes
from perl_megatron.triage.position_changes import position_changes
from perl_megatron.triage.token_changes import token_changes
from perl_megatron.types import View


@pytest.fixture(scope="module")
def cases(first_step) -> dict[tuple[str, int], Case]:
    """By record and view."""
    found = {}
    for rollout in read_rollouts(first_step.file):
        paths = tuple(first_step.root / "rollouts" / "images" / f"{key}.png" for key in rollout.image_keys)
        view = View(rollout.record, rollout.view, rollout.order, paths, rollout.question, "", "text")
        prompt = first_step.encoder.encode(view)
        images = tuple(
            ImageInput(key, first_step.encoder.patches(key), tuple(grid))
            for key, grid in zip(prompt.image_keys, prompt.grids.tolist(), strict=True)
        )
        found[rollout.record, rollout.view] = Case(rollout, ModelInput(prompt, rollout.response_ids, images))
    return found


def read(case: Case, encoder) -> str:
    """The prompt with `[k]` for k image tokens, and without the response."""
    pad, text, count = encoder.image_token_id, "", 0
    for token in [*case.prompt.token_ids.tolist(), None]:
        if token == pad:
            count += 1
            continue
        text += f"[{count}]" if count else ""
        count = 0
        text += "" if token is None else encoder.tokenizer.decode([token])
    return text


def check_whole(inputs: ModelInput, pad: int) -> None:
    """Image features fill exactly the image tokens that the prompt says."""
    counts = inputs.prompt.grids.prod(axis=1) // MERGE_SIZE**2
    assert sum(counts) == sum(each.num_tokens for each in inputs.images)
    for start, count in zip(inputs.prompt.image_starts, counts, strict=True):
        assert (inputs.prompt.token_ids[start : start + count] == pad).all()


def test_token_ids(cases, first_step):
    encoder, case = first_step.encoder, cases["two", 0]
    changes = dict(token_changes(encoder))
    shown = "<|vision_start|>[2]<|vision_end|> <|vision_start|>[6]<|vision_end|>"
    question = f"<|im_start|>user\n{shown} What is the sum of all the digits?<|im_end|>\n<|im_start|>assistant\n"
    system = "<|im_start|>system\nThink.<|im_end|>\n"
    whole = system + question
    expected = {
        "without the system turn": question,
        "the prompt's first token is missing": whole.removeprefix("<|im_start|>"),
        "the prompt's last token is missing": whole.removesuffix("\n"),
        "one image token for each image, and no pixels": whole.replace("[2]", "[1]").replace("[6]", "[1]"),
        "twice the image tokens, the second half without pixels": whole.replace("[2]", "[4]").replace("[6]", "[12]"),
    }
    assert read(case.plain, encoder) == whole
    for name, text in expected.items():
        inputs = changes.pop(name)(case)
        assert read(inputs, encoder) == text
        check_whole(inputs, encoder.image_token_id)
    others = {name: change(case) for name, change in changes.items()}
    assert {(each.late, each.rolled) for each in others.values()} == {(1, 0), (-1, 0), (0, 1), (0, -1)}
    assert all(each.prompt is case.plain.prompt for each in others.values())


def test_token_ids_without_images(cases, first_step):
    changes = dict(token_changes(first_step.encoder))
    assert changes["one image token for each image, and no pixels"](cases["none", 0]) is None
    assert changes["twice the image tokens, the second half without pixels"](cases["none", 0]) is None
    single = cases["none", 0]
    single = replace(single, plain=replace(single.plain, response=single.plain.response[:1]))
    assert changes["log-probabilities written one token later"](single) is None


def test_orders_of_images(cases, first_step):
    pad = first_step.encoder.image_token_id
    changes = dict(order_changes(3))
    original, permuted = cases["three", 0], cases["three", 1]  # permuted shows the images 2, 0, 1 of the record
    keys = original.plain.prompt.image_keys
    assert permuted.plain.prompt.image_keys == (keys[2], keys[0], keys[1])
    expected = {
        "images in the record's original order": keys,
        "images in reversed order": (keys[1], keys[0], keys[2]),
        "the first image in every place": (keys[2],) * 3,
        "images 1 and 3 swapped": (keys[1], keys[0], keys[2]),
        "images in the order 2, 3, 1": keys,
        "image 3 also in place of image 1": (keys[1], keys[0], keys[1]),
    }
    for name, shown in expected.items():
        inputs = changes[name](permuted)
        assert tuple(each.key for each in inputs.images) == shown == inputs.prompt.image_keys
        check_whole(inputs, pad)
    assert changes["images in the record's original order"](permuted).prompt.token_ids.tolist() == (
        original.plain.prompt.token_ids.tolist()
    )
    scattered = changes["features of the images scattered in the original order"](permuted)
    assert [each.key for each in scattered.images] == list(keys)
    assert scattered.prompt is permuted.plain.prompt


def test_an_order_that_changes_nothing_is_no_hypothesis(cases):
    changes = dict(order_changes(3))
    assert all(change(cases["none", 0]) is None for change in changes.values())
    for name in ("images in the record's original order", "features of the images scattered in the original order"):
        assert changes[name](cases["three", 0]) is None
    assert changes["images 2 and 3 swapped"](cases["two", 0]) is None
    twin = cases["two", 1]
    image = twin.plain.images[0]
    twin = replace(twin, plain=replace(twin.plain, images=(image, image)))
    assert all(change(twin) is None for change in changes.values())


def test_pixels(cases, first_step):
    case = cases["two", 0]
    changes = {name: change(case) for name, change in pixel_changes(first_step.encoder)}
    assert changes.pop("no pixels: image tokens keep their own embedding").images == ()
    with_pixels = {name: inputs.images[0].patches for name, inputs in changes.items()}
    pixels = np.asarray(first_step.encoder.image(case.plain.images[0].key), dtype=np.float32)
    right = case.plain.images[0].patches
    assert not with_pixels["blank images (all numbers 0 after normalization)"].any()
    unit = with_pixels["pixels from 0 to 1 without mean and deviation"]
    assert unit.mean() == pytest.approx(pixels.mean() / 255, abs=1e-5)
    assert with_pixels["pixels from 0 to 255 without rescaling"] == pytest.approx(255 * unit, abs=1e-2)
    black = with_pixels["black images"]
    assert np.allclose(black, black[0])
    mean, deviation = (np.array(values)[:, None] for values in first_step.encoder.normalization)

    def by_channel(patches):
        return patches.reshape(len(right), 3, -1)

    assert np.allclose(by_channel(right - black), by_channel(unit) / deviation, atol=1e-5)
    swapped = with_pixels["colour channels in the order blue, green, red"]
    assert np.allclose(by_channel(swapped) * deviation + mean, by_channel(unit)[:, ::-1], atol=1e-5)
    keys = {inputs.images[0].key for inputs in changes.values()} | {case.plain.images[0].key}
    assert len(keys) == len(changes) + 1  # features are remembered by key
    assert all(change(cases["none", 0]) is None for _, change in pixel_changes(first_step.encoder))


def test_positions(cases):
    original, permuted = cases["two", 0], cases["two", 1]
    names = [name for name, _ in position_changes()]
    changed = {name: change(permuted).positions for name, change in position_changes()}
    length = len(permuted.plain.prompt.token_ids)
    assert changed[names[0]].tolist() == [list(range(changed[names[0]].shape[1]))] * 3
    assert (changed["the response continues at the prompt's length"][:, length:] == np.arange(length, length + 9)).all()
    right = changed["the response's positions are one too large"][:, length:] - 1
    assert (changed["the response's positions are one too small"][:, length:] == right - 1).all()
    start = permuted.plain.prompt.image_starts[0]
    grid = permuted.plain.prompt.grids[0] // 2
    cells = changed["height and width of the images' positions swapped"][1:, start : start + grid[1] * grid[2]]
    assert (cells.max(axis=1) - cells.min(axis=1) + 1).tolist() == [grid[2], grid[1]]
    of_original = changed["image positions of the record's original order"]
    assert of_original.tolist() == position_ids(original.plain.prompt, 9).tolist()
    without = [name for name, change in position_changes() if change(cases["none", 0]) is not None]
    assert without == ["the response's positions are one too large", "the response's positions are one too small"]
    assert dict(position_changes())["image positions of the record's original order"](original) is None


def test_collapse():
    assert collapse(np.array([5, 9, 9, 6, 9, 7, 9, 9, 9]), 9) == (5, 9, 6, 9, 7, 9)
