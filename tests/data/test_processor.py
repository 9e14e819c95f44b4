import gc
import json
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import make_images, make_policy, make_view

from perl_megatron.data.cache import ByteBoundedCache
from perl_megatron.data.images import image_key
from perl_megatron.data.pixel_store import PixelStore, StoredImage
from perl_megatron.data.processor import VISION_TOKENS, PromptEncoder
from perl_megatron.data.wait_clock import DataWaits
from perl_megatron.errors import UserError

SIZES = [(28, 28), (56, 84), (100, 131), (30, 20)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def encoder(checkpoint):
    return PromptEncoder(checkpoint, system_prompt="Think first.")


@pytest.mark.parametrize("num_images", [0, 1, 2, 4])
def test_tokens_and_patches_equal_transformers_full_processor(checkpoint, encoder, tmp_path, num_images):
    from transformers import AutoProcessor

    view = make_view(make_images(tmp_path, SIZES[:num_images]))
    prompt = encoder.encode(view)
    processor = AutoProcessor.from_pretrained(checkpoint)
    text = processor.apply_chat_template(encoder.messages(view), tokenize=False, add_generation_prompt=True)
    images = [encoder.image(key) for key in prompt.image_keys]
    expected = processor(text=[text], images=images or None, return_tensors="pt")
    assert prompt.token_ids.tolist() == expected["input_ids"][0].tolist()
    assert prompt.token_ids.dtype == np.int64
    if images:
        assert prompt.grids.tolist() == expected["image_grid_thw"].tolist()
        patches = np.concatenate([encoder.patches(key) for key in prompt.image_keys])
        np.testing.assert_array_equal(patches, expected["pixel_values"].numpy())
    assert prompt.compact_ids == tuple(encoder.tokenizer(text).input_ids)


def test_a_folder_in_the_published_layout_reads_the_same(checkpoint, encoder, tmp_path):
    """Qwen2.5-VL was published with chat_template.json and preprocessor_config.json."""
    folder = tmp_path / "published"
    shutil.copytree(checkpoint, folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(settings["image_processor"]))
    view = make_view(make_images(tmp_path, SIZES))
    published = PromptEncoder(folder, system_prompt="Think first.")
    assert published.encode(view).token_ids.tolist() == encoder.encode(view).token_ids.tolist()
    for key in encoder.encode(view).image_keys:
        np.testing.assert_array_equal(published.patches(key), encoder.patches(key))


def test_prompt_has_the_published_shape(encoder, tmp_path):
    view = make_view(make_images(tmp_path, [(28, 28)]), question="Which?")
    compact = encoder.tokenizer.decode(encoder.encode(view).compact_ids)
    assert compact == (
        "<|im_start|>system\nThink first.<|im_end|>\n<|im_start|>user\n"
        "Image 1: <|vision_start|><|image_pad|><|vision_end|> Which?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_image_starts_point_at_each_image(encoder, tmp_path):
    prompt = encoder.encode(make_view(make_images(tmp_path, SIZES)))
    for start, grid in zip(prompt.image_starts, prompt.grids, strict=True):
        count = int(grid.prod()) // 4
        assert (prompt.token_ids[start : start + count] == encoder.image_token_id).all()
        assert prompt.token_ids[start - 1] != encoder.image_token_id != prompt.token_ids[start + count]
    assert (prompt.token_ids == encoder.image_token_id).sum() == prompt.grids.prod(axis=1).sum() // 4


def test_equal_images_share_a_key_and_an_encoding_is_memoised(encoder, tmp_path):
    first, second = make_images(tmp_path, [(28, 28), (56, 56)])
    copy = tmp_path / "copy.png"
    shutil.copy(first, copy)
    prompt = encoder.encode(make_view([first, second, copy]))
    assert prompt.image_keys[0] == prompt.image_keys[2] != prompt.image_keys[1]
    assert encoder.encode(make_view([first, second, copy])) is prompt


def test_dropped_pixels_are_read_again_and_a_changed_file_is_noticed(checkpoint, tmp_path):
    (path,) = make_images(tmp_path, [(28, 28)])
    kept = PromptEncoder(checkpoint, system_prompt="")
    dropped = PromptEncoder(checkpoint, system_prompt="", pixels=PixelStore(None, 0))
    key = kept.encode(make_view([path])).image_keys[0]
    assert dropped.encode(make_view([path])).image_keys == (key,)
    assert image_key(dropped.image(key)) == key
    np.testing.assert_array_equal(dropped.patches(key), kept.patches(key))
    Image.new("RGB", (28, 28)).save(path)
    with pytest.raises(UserError, match="changed while it was in use"):
        dropped.patches(key)
    assert image_key(kept.image(key)) == key


def test_encoders_of_one_store_read_each_others_pixels(checkpoint, tmp_path):
    paths = make_images(tmp_path / "images", SIZES)
    store = PixelStore(tmp_path, 2**20)
    one, other = (PromptEncoder(checkpoint, system_prompt="", pixels=store) for _ in range(2))
    prompt = one.encode(make_view(paths))
    other._reader = None  # nothing is decoded again
    other._path_of_key, other._grids = one._path_of_key, one._grids
    for key, path in zip(prompt.image_keys, paths, strict=True):
        assert image_key(other.image(key)) == key
        np.testing.assert_array_equal(other.patches(key), one.patches(key))
        assert one.patches(key) is not one.patches(key), path  # none are kept


def test_pixel_bounds_of_the_config_hold(checkpoint, tmp_path):
    (path,) = make_images(tmp_path, [(280, 280)])
    small = PromptEncoder(checkpoint, system_prompt="", max_pixels=100 * 100)
    assert small.encode(make_view([path])).grids.tolist() == [[1, 6, 6]]
    large = PromptEncoder(checkpoint, system_prompt="", min_pixels=300 * 300)
    assert large.encode(make_view([path])).grids.tolist() == [[1, 22, 22]]


def test_image_that_would_be_resized_twice_is_refused(checkpoint, tmp_path):
    encoder = PromptEncoder(checkpoint, system_prompt="", max_pixels=28 * 28 * 4)
    path = tmp_path / "long.png"
    Image.new("RGB", (28 * 60, 28)).save(path)
    with pytest.raises(UserError, match="again"):
        encoder.encode(make_view([path]))


@pytest.mark.parametrize("changed", [{"patch_size": 16}, {"temporal_patch_size": 1}, {"merge_size": 1}])
def test_an_image_processor_that_cuts_other_patches_is_refused(checkpoint, tmp_path, changed):
    folder = tmp_path / "other"
    shutil.copytree(checkpoint, folder)
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"image_processor": settings["image_processor"] | changed}))
    with pytest.raises(UserError, match=r"image processor is not Qwen2\.5-VL's"):
        PromptEncoder(folder, system_prompt="")


@pytest.mark.parametrize("token", [*VISION_TOKENS, "<|im_end|>"])
def test_special_tokens_in_a_users_text_are_refused(encoder, checkpoint, tmp_path, token):
    view = make_view(make_images(tmp_path, [(28, 28)]), question=f"What is {token}?")
    with pytest.raises(UserError, match="special token"):
        encoder.encode(view)
    with pytest.raises(UserError, match="special token"):
        encoder.encode_response(token)
    with pytest.raises(UserError, match=r"data\.system_prompt"):
        PromptEncoder(checkpoint, system_prompt=token)


def test_placeholders_must_match_images(encoder, tmp_path):
    view = make_view(make_images(tmp_path, [(28, 28)]), question="and <image>?")
    with pytest.raises(UserError, match="2 <image> placeholders, but there are 1 images"):
        encoder.encode(view)


def test_a_response_ends_its_turn_and_decodes_to_itself(encoder):
    text = "<think>3, 71</think> \\boxed{é 5}"
    ids = encoder.encode_response(text)
    assert ids.dtype == np.int64
    assert ids[-1] == encoder.turn_end_id
    assert encoder.turn_end_id in encoder.end_token_ids
    assert encoder.decode(ids) == text
    assert len(encoder.encode_response("<think>375</think>\\boxed{7}")) == 9
    assert encoder.decode([encoder.image_token_id, *ids]) == "<|image_pad|>" + text


def test_every_embedding_row_is_a_token(encoder):
    assert encoder.vocabulary_size == len(encoder.tokenizer)
    assert len(encoder.banned_token_ids) == len(VISION_TOKENS)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        PromptEncoder(tmp_path, system_prompt="")


def test_tiny_policy_is_deterministic_and_follows_its_seed(checkpoint, tmp_path):
    again, other = make_policy(tmp_path / "again"), make_policy(tmp_path / "other", seed=1)
    for path in checkpoint.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
        assert (path.read_bytes() == (other / path.name).read_bytes()) == (path.suffix != ".safetensors"), path.name


def test_cache_drops_the_least_recently_used_by_bytes():
    cache: ByteBoundedCache[int] = ByteBoundedCache(10)
    cache.put("a", 1, num_bytes=4)
    cache.put("b", 2, num_bytes=4)
    assert cache.get("a") == 1
    cache.put("c", 3, num_bytes=4)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (1, None, 3)
    cache.put("d", 4, num_bytes=11)
    assert cache.get("d") is None
    assert cache.num_bytes == 8


def test_what_is_decoded_ahead_is_taken_also_where_the_image_is_known(checkpoint, tmp_path):
    paths = make_images(tmp_path / "images", SIZES)
    plain = PromptEncoder(checkpoint, system_prompt="")
    ahead = PromptEncoder(checkpoint, system_prompt="", pixels=PixelStore(tmp_path, 2**20))
    ahead.decode_ahead(num_processes=2, max_bytes=2**30)
    for is_memoised in (False, False, True):
        if not is_memoised:
            ahead._prompts = ByteBoundedCache(2**20)
        for file in (tmp_path / "pixels").iterdir():  # as if others had pushed them out
            file.unlink()
        ahead.expect(paths)
        assert all(map(ahead._ahead.holds, paths))
        for path in paths:
            prompt = ahead.encode(make_view([path], question=str(path)))
            assert prompt.image_keys == plain.encode(make_view([path])).image_keys
            assert not ahead._ahead.holds(path)
    ahead.expect(paths)
    assert not any(map(ahead._ahead.holds, paths))  # their pixels are there
    assert ahead._ahead._max_bytes == 2**19  # so that what waits does not push itself out
    ahead._ahead.close()


def test_waiting_for_images_is_timed_also_where_their_pixels_were_dropped(checkpoint, tmp_path):
    paths = make_images(tmp_path, SIZES)
    encoder = PromptEncoder(checkpoint, system_prompt="", pixels=PixelStore(None, 0))
    keys = encoder.encode(make_view(paths)).image_keys
    first = encoder.waits.take()
    assert first.total == first.images > 0
    assert first.dropped == 0
    encoder.image(keys[0])
    again = encoder.waits.take()
    assert again.total >= again.dropped >= again.images > 0
    kept = PromptEncoder(checkpoint, system_prompt="", pixels=PixelStore(None, 2**30))
    kept.encode(make_view(paths))
    kept.waits.take()
    kept.image(kept.encode(make_view(paths)).image_keys[0])
    assert kept.waits.take() == DataWaits()


def test_images_of_an_earlier_epoch_are_waited_for_with_their_question(checkpoint, tmp_path):
    view = make_view(make_images(tmp_path / "images", SIZES))
    encoder = PromptEncoder(checkpoint, system_prompt="", pixels=PixelStore(tmp_path, 2**20))
    encoder.decode_ahead(num_processes=1, max_bytes=2**30)
    keys = encoder.encode(view).image_keys
    encoder.take_waits()
    for file in (tmp_path / "pixels").iterdir():
        file.unlink()
    encoder.encode(view)  # memoised
    waits = encoder.take_waits()
    assert waits.images > 0
    assert waits.dropped == 0
    for key in keys:
        encoder.patches(key)
    assert encoder.take_waits() == DataWaits()


def test_images_of_a_waiting_prompt_are_there_whatever_came_after_it(checkpoint, tmp_path):
    """Also where the prompt was memoised, where two files hold the image, and in two threads."""
    paths = make_images(tmp_path, [(28, 28 * width) for width in range(1, 41)])
    twin = tmp_path / "twin.png"
    shutil.copy(paths[0], twin)
    views = [make_view([path], question=path.name) for path in (*paths, twin, *paths)]
    encoder = PromptEncoder(checkpoint, system_prompt="", pixels=PixelStore(None, 0))  # as if others pushed them out
    plain = PromptEncoder(checkpoint, system_prompt="")
    with ThreadPoolExecutor(2) as threads:
        prompts = list(threads.map(encoder.encode, views))
        patches = list(threads.map(encoder.patches, [prompt.image_keys[0] for prompt in prompts]))
    for view, prompt, found in zip(views, prompts, patches, strict=True):
        expected = plain.encode(view)
        assert prompt.token_ids.tolist() == expected.token_ids.tolist()
        np.testing.assert_array_equal(found, plain.patches(expected.image_keys[0]))


def test_no_image_is_forgotten_and_what_is_kept_of_it_is_small(checkpoint):
    """Their pixels come from no file here, and none are kept."""
    encoder = PromptEncoder(checkpoint, system_prompt="", pixels=PixelStore(None, 0))

    def read(path: Path) -> StoredImage:
        image = Image.new("RGB", (28, 28), tuple(int(path.stem).to_bytes(3, "big")))
        return StoredImage(image_key(image), np.asarray(image), False)

    encoder._read = read
    paths = [f"/data/folder/of/many/images/{number:08d}.png" for number in range(2**14 + 1)]
    tracemalloc.start()
    try:
        keys = [encoder._read_image(Path(path)) for path in paths]
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0] / len(paths)
    finally:
        tracemalloc.stop()
    assert kept < 450, f"{kept:.0f} bytes"
    for number in (0, 1, 2**13, 2**14):
        assert encoder.patches(keys[number]).shape == (4, 1176)
        assert encoder.image(keys[number]).getpixel((0, 0)) == tuple(number.to_bytes(3, "big"))
