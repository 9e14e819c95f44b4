"""The auxiliary question about the order of images: its answer, its views, and which records it is made of."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from perl_megatron.config.schema import PermutationConfig
from perl_megatron.data.images import image_key, load_image
from perl_megatron.data.permutation import apply_order, validate_contract
from perl_megatron.data.planner import plan_views
from perl_megatron.data.recover_order import MAX_IMAGES, maybe_recover_order, most_images_asked, recover_order_question
from perl_megatron.reward.grade import is_right
from perl_megatron.types import PermutationContract, Record


def record_of(*images: Path, name: str = "q") -> Record:
    text = "<image>" * len(images) + "What is the sum of image 1 and the last image?"
    return Record(name, images, text, "7", "number", contract=PermutationContract(tuple(range(len(images)))))


@pytest.fixture
def images(tmp_path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(MAX_IMAGES + 1)]
    for number, path in enumerate(paths):
        Image.fromarray(np.full((2, 2, 3), number, np.uint8)).save(path)
    return paths


def keys_of(record) -> list[str]:
    return [image_key(load_image(path, 28 * 28, 56 * 56)) for path in record.images]


def true_numbers(view_images) -> list[int]:
    """For each image of the first half, the 1-based number of its copy in the second half."""
    half = len(view_images) // 2
    return [half + 1 + view_images[half:].index(image) for image in view_images[:half]]


def test_hand_computed():
    a, b, c = Path("a"), Path("b"), Path("c")
    asked = recover_order_question(record_of(a, b, c), (2, 0, 1))
    assert asked.images == (a, b, c, c, a, b)
    assert asked.answer == "5, 6, 4"
    assert (asked.id, asked.kind, asked.answer_type) == ("q#recover_order", "recover_order", "ordering")
    assert "For each of images 1 to 3, in this order" in asked.text


@given(st.permutations(range(MAX_IMAGES)).flatmap(lambda order: st.tuples(st.just(order), st.integers(2, MAX_IMAGES))))
@settings(deadline=None, max_examples=60)
def test_every_order_is_valid_and_the_answer_is_where_the_images_are(case):
    shuffled, count = case
    order = [slot for slot in shuffled if slot < count]
    asked = recover_order_question(record_of(*(Path(str(n)) for n in range(count))), order)
    validate_contract(asked)
    assert [int(number) for number in asked.answer.split(", ")] == true_numbers(asked.images)
    moved = [*range(count), *(count + slot for slot in reversed(range(count)))]
    view = apply_order(asked, moved, 1)
    assert view.images[:count] == asked.images[:count]
    assert view.text == asked.text
    assert [int(number) for number in view.answer.split(", ")] == true_numbers(view.images)
    assert is_right(", ".join(map(str, true_numbers(view.images))), view.answer, view.answer_type, where="")


def test_its_views_permute_the_second_block_alone(images):
    asked = recover_order_question(record_of(*images[:4]), (1, 3, 0, 2))
    views = plan_views(asked, num_permuted=3, alpha=1.0, seed=0, step=0)
    assert len({view.order for view in views}) == 4
    for view in views:
        assert view.images[:4] == tuple(images[:4])
        assert [int(number) for number in view.answer.split(", ")] == true_numbers(view.images)


def test_the_draw_depends_on_seed_step_and_record_alone(images):
    def draw(name="q", **keys):
        return maybe_recover_order(
            record_of(*images[:6], name=name), keys_of, probability=1.0, **({"seed": 0, "step": 0} | keys)
        ).answer

    assert draw() == draw()
    assert len({draw(), draw(name="r"), draw(seed=1), draw(step=1)}) == 4


def test_so_many_are_replaced_as_the_probability_says(images):
    record = record_of(*images[:2])
    kinds = [maybe_recover_order(record, keys_of, probability=0.3, seed=0, step=step).kind for step in range(1000)]
    assert 230 <= kinds.count("recover_order") <= 370
    answers = {maybe_recover_order(record, keys_of, probability=1.0, seed=0, step=step).answer for step in range(50)}
    assert answers == {"3, 4", "4, 3"}  # the first block's order is one of those to be recovered


def test_records_that_do_not_suit_are_left_alone(images, tmp_path):
    """The last have an image twice: in one file, in two of the same pixels, in two that the resize makes the same."""
    other_file, larger = tmp_path / "other.bmp", tmp_path / "larger.png"
    Image.open(images[0]).save(other_file)
    Image.open(images[0]).resize((5, 5)).save(larger)
    twins = [record_of(images[0], images[1], same) for same in (images[0], other_file, larger)]
    for unsuited in (record_of(), record_of(images[0]), record_of(*images), *twins):
        assert maybe_recover_order(unsuited, keys_of, probability=1.0, seed=0, step=0) is unsuited
    plain = record_of(*images[:2])
    assert maybe_recover_order(plain, keys_of, probability=0.0, seed=0, step=0) is plain


def test_an_engine_has_to_take_twice_the_images():
    """Of records with up to so many: those of MAX_IMAGES are doubled, longer ones stay."""
    asked, plain = PermutationConfig(recover_order=0.1), PermutationConfig()
    counts = [0, 1, 2, MAX_IMAGES, MAX_IMAGES + 1, 3 * MAX_IMAGES]
    assert [most_images_asked(count, plain) for count in counts] == counts
    doubled = 2 * MAX_IMAGES
    assert [most_images_asked(count, asked) for count in counts] == [0, 1, 4, doubled, doubled, 3 * MAX_IMAGES]
