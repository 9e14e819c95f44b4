"""From a view to what the model reads: token ids, image patches, and back to text.

The checkpoint's own chat template, tokenizer and image processor are used (through transformers). Images reach them
already resized (``data/images.py``), and the image processor has to leave that size alone: so the trainer and every
engine see the same pixels and the same number of image tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from perl_megatron.data.cache import ByteBoundedCache
from perl_megatron.data.image_reader import ImageReader, as_image
from perl_megatron.data.images_ahead import ImagesAhead
from perl_megatron.data.node_folder import own_pixels
from perl_megatron.data.patches import MERGE_SIZE, PATCH_SIZE, Patches
from perl_megatron.data.pixel_store import PixelStore, StoredImage
from perl_megatron.data.tokenizer_check import check_tokenizer
from perl_megatron.data.wait_clock import DataWaits, WaitClock
from perl_megatron.errors import UserError
from perl_megatron.runtime import torchvision_schema
from perl_megatron.types import IMAGE_PLACEHOLDER, EncodedPrompt, View

torchvision_schema.install()  # transformers imports torchvision for Qwen2.5-VL's processor

import transformers  # noqa: E402

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
"""Special tokens that only a prompt may hold: sampled ones would shift the images, so engines never sample them."""
PROMPT_BYTES = 64 * 2**20
"""Of prompts that are kept."""
PIXEL_BYTES = 512 * 2**20
"""Of pixels that an encoder by itself keeps."""


class PromptEncoder:
    """Encodes views for one checkpoint. P prompt tokens, I images, N patches of an image.

    Pixels are in a store that other processes may share; those that it dropped are decoded again from the image file
    when they are needed. For that, the path, key and size of every image ever encoded are kept, about 300 bytes each:
    how long a prompt waits for its images is not known here. Patches have eight times the bytes of their pixels and are
    made in a millisecond, so they are made for whoever asks and not kept. For any number of threads. Other processes
    can decode images ahead (``decode_ahead``).
    """

    def __init__(
        self,
        model_path: Path | str,
        *,
        system_prompt: str,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        pixels: PixelStore | None = None,
    ):
        """Read tokenizer, chat template and image processor of a Qwen2.5-VL folder.

        ``min_pixels`` and ``max_pixels`` bound an image's area in pixels; None: the checkpoint's own. ``pixels`` keeps
        decoded images; None: a store of this encoder's own. Raises UserError if the folder holds no Qwen2.5-VL or the
        system prompt holds a special token.
        """
        self.model_path = Path(model_path)
        self.tokenizer: Any
        model_config, self.tokenizer, self._image_processor = _read_checkpoint(self.model_path)
        self.end_token_ids = _end_token_ids(self.model_path, self.tokenizer)
        size = self._image_processor.size
        self.min_pixels = int(size["shortest_edge"] if min_pixels is None else min_pixels)
        self.max_pixels = int(size["longest_edge"] if max_pixels is None else max_pixels)
        self._image_processor.size = {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}
        self._make_patches = self._read_processor()

        added = self.tokenizer.added_tokens_decoder
        self._special_tokens = {token.content: index for index, token in added.items() if token.special}
        vision_ids = [self._special_tokens.get(token) for token in VISION_TOKENS]
        self.banned_token_ids = tuple(index for index in vision_ids if index is not None)
        self.image_token_id = int(model_config.image_token_id)
        self.turn_end_id = int(self.tokenizer.eos_token_id)
        self.pad_token_id = int(self.tokenizer.pad_token_id)
        self.vocabulary_size = int(model_config.get_text_config().vocab_size)
        if self.image_token_id not in self.banned_token_ids:
            raise UserError(
                f"image token id {self.image_token_id} of config.json is not the tokenizer's <|image_pad|>",
                where=str(self.model_path),
                fix="use the tokenizer that belongs to the model",
            )
        self._refuse_special_tokens(system_prompt, where="data.system_prompt")
        self._system_prompt = system_prompt

        self._prompts: ByteBoundedCache[EncodedPrompt] = ByteBoundedCache(PROMPT_BYTES)
        # Paths as text, and one tuple for all equal grids: less than half the bytes for an image.
        self._key_of_path: dict[str, str] = {}
        self._path_of_key: dict[str, str] = {}
        self._grids: dict[str, tuple[int, int, int]] = {}
        self._equal_grids: dict[tuple[int, int, int], tuple[int, int, int]] = {}
        self._pixels = own_pixels(PIXEL_BYTES) if pixels is None else pixels
        self._reader = ImageReader(self._pixels, self.min_pixels, self.max_pixels)
        self._ahead: ImagesAhead | None = None
        self.waits = WaitClock()
        """Times, for each thread, how long it waits for images; who uses the encoder may add waits of its own."""

    def decode_ahead(self, *, num_processes: int, max_bytes: int, turn: tuple[int, int] = (0, 1)) -> None:
        """From now on let ``num_processes`` processes decode the images that are expected, up to ``max_bytes``.

        ``turn``: this encoder's number of those that expect the same images in one store, and how many these are.
        """
        if self._ahead is not None:
            self._ahead.close()
        max_bytes = min(max_bytes, self._pixels.max_bytes // 2)  # what waits must not push itself out
        self._ahead = ImagesAhead(self._reader, num_processes=num_processes, max_bytes=max_bytes, turn=turn)

    def expect(self, images: Iterable[Path]) -> None:
        """These images will be encoded next, in this order."""
        if self._ahead is not None:
            self._ahead.expect(path for path in images if not self._pixels.holds(self._key_of_path.get(str(path), "")))

    def take_waits(self) -> DataWaits:
        """What the calling thread has waited since the last call, by ``waits``."""
        ahead_was_full = self._ahead is not None and self._ahead.take_was_full()
        return replace(self.waits.take(), ahead_was_full=ahead_was_full)

    def encode(self, view: View) -> EncodedPrompt:
        """The view's prompt, up to where the assistant's turn begins; nothing is truncated.

        Raises UserError if the text's placeholders do not match the images, the text holds a special token (such as
        ``<|image_pad|>``), or an image cannot be read.
        """
        memo = (view.text, view.images)
        prompt = self._prompts.get(memo)
        if prompt is None:
            prompt = self._encode(view)
            self._prompts.put(memo, prompt, num_bytes=prompt.token_ids.nbytes + 40 * len(prompt.compact_ids))
        else:
            self._have_pixels(view.images)
        return prompt

    def image(self, key: str) -> Image:
        """The resized RGB image whose content hash is ``key`` (of a prompt encoded before)."""
        return as_image(self._pixels_of(key))

    def patches(self, key: str) -> np.ndarray:
        """float32 [N, 1176]: an image's normalised patches, in 2 × 2 merge blocks, as the vision tower reads them."""
        return self._make_patches(self._pixels_of(key))

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of a response without its end-of-turn token; every other special token stays visible."""
        kept = [int(index) for index in token_ids]
        while kept and kept[-1] in self.end_token_ids:
            kept.pop()
        return str(self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def encode_response(self, text: str) -> np.ndarray:
        """int64 [R]: a demonstration's tokens and the end-of-turn token; UserError if it holds a special token."""
        self._refuse_special_tokens(text, where=f"demonstration {text[:60]!r}")
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return np.array([*ids, self.turn_end_id], dtype=np.int64)

    @property
    def normalization(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of each colour channel, which pixels from 0 to 1 are normalized with."""
        return self._image_processor.image_mean, self._image_processor.image_std

    def messages(self, view: View) -> list[dict[str, Any]]:
        """System and user message in transformers' form; an image's part is ``{"type": "image"}``, without pixels."""
        content: list[dict[str, Any]] = []
        for index, piece in enumerate(view.text.split(IMAGE_PLACEHOLDER)):
            if index > 0:
                content.append({"type": "image"})
            if piece:
                content.append({"type": "text", "text": piece})
        system = [{"role": "system", "content": self._system_prompt}] if self._system_prompt else []
        return [*system, {"role": "user", "content": content}]

    def _encode(self, view: View) -> EncodedPrompt:
        where = f"record {view.record_id}"
        num_placeholders = view.text.count(IMAGE_PLACEHOLDER)
        if num_placeholders != len(view.images):
            raise UserError(
                f"the text has {num_placeholders} {IMAGE_PLACEHOLDER} placeholders, but there are "
                f"{len(view.images)} images",
                where=where,
                fix=f"write {IMAGE_PLACEHOLDER} once for each image",
            )
        self._refuse_special_tokens(view.text, where=where)
        keys = tuple(self._read_image(path) for path in view.images)
        prompt = self.tokenizer.apply_chat_template(self.messages(view), tokenize=False, add_generation_prompt=True)
        compact = self.tokenizer(prompt, add_special_tokens=False).input_ids
        grids = np.array([self._grids[key] for key in keys], dtype=np.int64).reshape(-1, 3)
        token_ids, starts = _expand(compact, self.image_token_id, grids.prod(axis=1) // MERGE_SIZE**2)
        return EncodedPrompt(np.array(token_ids, dtype=np.int64), tuple(compact), tuple(starts), grids, keys)

    def _read_image(self, path: Path) -> str:
        """Key of the image at ``path``; its grid is checked and remembered."""
        key = self._key_of_path.get(str(path))
        if key is None:
            image = self._read(path)
            key = image.key
            if key not in self._grids:
                grid = self._grid(image.pixels, where=str(path))
                self._path_of_key[key] = str(path)  # first: who finds the grid in another thread relies on it
                self._grids[key] = self._equal_grids.setdefault(grid, grid)
            self._key_of_path[str(path)] = key
        else:
            self._have_pixels([path])
        return key

    def _have_pixels(self, paths: Iterable[Path]) -> None:
        """Of images read before: take what was decoded ahead (others are decoded in its place), and what was dropped.

        Where one cannot be read any more, that is told when it is needed.
        """
        if self._ahead is None:
            return
        for path in paths:
            if self._ahead.holds(path) or not self._pixels.holds(self._key_of_path[str(path)]):
                with contextlib.suppress(UserError):
                    self._read(path)

    def _pixels_of(self, key: str) -> np.ndarray:
        """uint8 [height, width, 3]: the pixels whose content hash is ``key``; decoded again where they were dropped."""
        image = self._pixels.get(key)
        if image is None:
            path = Path(self._path_of_key[key])
            with self.waits("dropped"):
                image = self._read(path)
            if image.key != key:
                raise UserError("the image file changed while it was in use", where=str(path), fix="restart the run")
        return image.pixels

    def _read(self, path: Path) -> StoredImage:
        with self.waits("images"):
            return self._reader.read(path) if self._ahead is None else self._ahead.read(path)

    def _grid(self, pixels: np.ndarray, *, where: str) -> tuple[int, int, int]:
        """(time, height, width) in patches of an image that is resized already."""
        height, width, _ = pixels.shape
        grid = (1, height // PATCH_SIZE, width // PATCH_SIZE)
        # Fewer patches after a reduction, more after an enlargement: as many only where the size stays.
        num_patches = self._image_processor.get_number_of_image_patches(height, width, {})
        if num_patches != grid[1] * grid[2]:
            raise UserError(
                f"the checkpoint's image processor would resize an image of {width}x{height} pixels again, "
                f"to {num_patches} patches instead of {grid[1] * grid[2]}",
                where=where,
                fix="raise data.max_pixels, or crop the image to a less extreme shape",
            )
        return grid

    def _read_processor(self) -> Patches:
        """What the checkpoint's image processor does to an image of the right size."""

        def process(pixels: np.ndarray) -> np.ndarray:
            features = self._image_processor(images=[as_image(pixels)], do_resize=False, return_tensors="pt")
            return features["pixel_values"].float().contiguous().numpy()

        try:
            return Patches(process)
        except (ValueError, RuntimeError) as error:  # the latter is torch's, for patches of another size
            raise UserError(
                f"the checkpoint's image processor is not Qwen2.5-VL's: {error}",
                where=str(self.model_path),
                fix="use the preprocessor_config.json that belongs to the model",
            ) from error

    def _refuse_special_tokens(self, text: str, *, where: str) -> None:
        """A special token in a user's text would forge a turn or an image."""
        found = [token for token in self._special_tokens if token in text]
        if found:
            raise UserError(f"the text holds the model's special token {found[0]}", where=where, fix="remove it")


def _expand(compact: Sequence[int], image_token_id: int, counts: np.ndarray) -> tuple[list[int], list[int]]:
    """Repeat the k-th image token ``counts[k]`` times; returns the ids and where each image begins."""
    token_ids: list[int] = []
    starts: list[int] = []
    for index in compact:
        if index == image_token_id:
            starts.append(len(token_ids))
            token_ids.extend([index] * int(counts[len(starts) - 1]))
        else:
            token_ids.append(index)
    assert len(starts) == len(counts), f"the chat template wrote {len(starts)} image tokens for {len(counts)} images"
    return token_ids, starts


def _read_checkpoint(path: Path) -> tuple[Any, Any, Any]:
    """Model configuration, tokenizer with chat template, and image processor of the Qwen2.5-VL folder ``path``."""
    where = "model.path"
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a Hugging Face model folder: it has no config.json", where=where)
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    if config.model_type != "qwen2_5_vl":
        raise UserError(f"{path} holds a {config.model_type} model", where=where, fix="use a Qwen2.5-VL checkpoint")
    try:
        # Not as one AutoProcessor, which would also load video processors and Mistral's tokenizer: half a second.
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        image_processor = transformers.AutoImageProcessor.from_pretrained(path, local_files_only=True)
        if not tokenizer.chat_template:  # older folders have it in a file that only the processor reads
            tokenizer.chat_template = transformers.AutoProcessor.from_pretrained(
                path, local_files_only=True
            ).chat_template
    except Exception as error:  # the tokenizers library raises nothing more specific for a damaged file
        raise UserError(
            f"cannot read tokenizer and image processor of {path}: {error}",
            where=where,
            fix="the folder needs tokenizer.json (or a SentencePiece tokenizer.model), the chat template and "
            "preprocessor_config.json of the model",
        ) from error
    check_tokenizer(tokenizer, path)
    return config, tokenizer, image_processor


def _end_token_ids(path: Path, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a turn: the tokenizer's, and those of generation_config.json."""
    ends = [tokenizer.eos_token_id]
    if (path / "generation_config.json").is_file():
        generation = transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
        listed = generation.eos_token_id
        ends += listed if isinstance(listed, list) else [listed]
    return tuple(dict.fromkeys(int(index) for index in ends if index is not None))
