"""Write a tiny Qwen2.5-VL policy with random weights: `python tools/make_tiny_policy.py OUT [--seed 0 …]`.

It is a true Qwen2.5-VL in Hugging Face's layout (window attention and full-attention blocks, merger, mRoPE, grouped
queries, QKV biases), small enough to learn on two CPU cores, with a byte-level BPE tokenizer of Qwen's shape: digits
are always single tokens, and `<think>`, `</think>` and `\\boxed{` are one token each, so that responses are short. The
same arguments give the same files, bit for bit. It ends by printing the number of parameters.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perl_megatron.errors import UserError
from perl_megatron.runtime import torchvision_schema

torchvision_schema.install()

import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
RESPONSE_TOKENS = ("<think>", "</think>", "\\boxed{")

# Qwen2's pre-tokenizer: every digit stands alone, and a word takes the space before it.
PRETOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Qwen2.5-VL's chat template without tools and videos.
CHAT_TEMPLATE = (
    "{% set images = namespace(count=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' or 'image_url' in part %}"
    "{% set images.count = images.count + 1 %}"
    "{% if add_vision_id %}Picture {{ images.count }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# What the tokenizer learns its words from, beside --corpus: questions about digits as the demo asks them.
CORPUS = (
    "system\nuser\nassistant\nYou are a helpful assistant. Picture 1:",
    "First think about the question inside <think> </think>. Then give the final answer inside \\boxed{}.",
    "Read the images, think, then answer in a box. Image 1: Image 2: image 3 images digit digits number numbers",
    "Which digit is in image 2? What digit does image 1 show? Which digit is in the first image?",
    "the second image, the third image, the fourth image, the fifth image, the last image",
    "Which image shows the digit 7? Which option is the image that shows a 7? Answer with the letter of the option.",
    "Options: A, B, C, D, E. (A) (B) (C) (D) (E) none of these",
    "Which digit is larger, the one in image 1 or the one in image 2? Is the digit in image 1 larger than in image 3?",
    "Order the images from the smallest digit to the largest. Sort the images by their digits. Answer: 3, 1, 2",
    "What is the sum of all the digits? What is the largest digit? What is the smallest digit? What is the difference?",
    "yes no = + - , ; : 0 1 2 3 4 5 6 7 8 9",
)


@dataclass(frozen=True)
class TinyShape:
    """Sizes of the tiny policy; the language model's head_dim (hidden / heads) has to be one that vLLM knows."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 224
    vision_hidden: int = 64
    vision_depth: int = 4
    vision_heads: int = 4
    vision_intermediate: int = 144
    tie: bool = False
    rope_theta: float = 10_000.0
    """Published models have 1e6; tiny prompts are learnt faster with less."""
    init_std: float = 0.02
    """Standard deviation of the random weights; a model this small learns faster with more than the usual 0.02."""
    max_pixels: int = 1280 * 28 * 28
    merges: int = 400
    """Upper bound on the tokenizer's learnt merges."""

    def check(self) -> None:
        """Raise UserError for sizes that do not fit together."""
        problems = [
            (self.hidden % self.heads != 0, "hidden must be a multiple of heads"),
            (self.heads % self.kv_heads != 0, "heads must be a multiple of kv_heads"),
            ((self.hidden // self.heads) % 32 != 0, "head_dim (hidden / heads) must be a multiple of 32 for vLLM"),
            (self.vision_hidden % (4 * self.vision_heads) != 0, "vision_hidden must be a multiple of 4 * vision_heads"),
            (min(self.layers, self.vision_depth) < 1, "layers and vision_depth must be at least 1"),
        ]
        for wrong, message in problems:
            if wrong:
                raise UserError(message, where=f"tiny policy {self}")


def train_tokenizer(corpus: Iterable[str], *, merges: int) -> Any:
    """Byte-level BPE in Qwen2's form; its length is a multiple of 8, so that every embedding row is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZER), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in RESPONSE_TOKENS])
    num_filler = -tokenizer.get_vocab_size() % 8
    tokenizer.add_tokens([AddedToken(f"<|extra_{index}|>", normalized=False) for index in range(num_filler)])
    return transformers.Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        bos_token=None,
        chat_template=CHAT_TEMPLATE,
        model_max_length=32768,
    )


def make_config(shape: TinyShape, tokenizer: Any) -> Any:
    """transformers' Qwen2.5-VL configuration of this shape."""
    token_id = tokenizer.convert_tokens_to_ids
    half = shape.hidden // shape.heads // 2
    height = half * 3 // 8  # the published split: 16, 24, 24 of 64
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "initializer_range": shape.init_std,
        "tie_word_embeddings": shape.tie,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": shape.rope_theta,
            "mrope_section": [half - 2 * height, height, height],
        },
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
    }
    every = max(1, shape.vision_depth // 2)
    vision = {
        "depth": shape.vision_depth,
        "hidden_size": shape.vision_hidden,
        "intermediate_size": shape.vision_intermediate,
        "num_heads": shape.vision_heads,
        "out_hidden_size": shape.hidden,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": list(range(every - 1, shape.vision_depth, every)),
        "tokens_per_second": 2,
        "in_channels": 3,
        "initializer_range": shape.init_std,
    }
    return transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=shape.tie,
        initializer_range=shape.init_std,
        dtype="float32",
    )


def make_tiny_policy(target: Path, shape: TinyShape, *, seed: int = 0, corpus: Iterable[str] = ()) -> int:
    """Write weights, configuration, tokenizer, processors, chat template and generation config; returns parameters."""
    shape.check()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = train_tokenizer([*CORPUS, *corpus], merges=shape.merges)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen2_5_VLForConditionalGeneration(make_config(shape, tokenizer)).float()
    end, pad = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.generation_config.eos_token_id = [end, pad]
    model.generation_config.pad_token_id = pad
    model.save_pretrained(target)
    transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=shape.max_pixels),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(target)
    return sum(parameter.numel() for parameter in model.parameters())


def read_corpus(path: Path) -> list[str]:
    """A text file's lines; of a JSON-lines file the strings under 'text' and 'demonstration'."""
    if not path.is_file():
        raise UserError(f"no such file: {path}", where="--corpus")
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix != ".jsonl":
        return lines
    records = [json.loads(line) for line in lines if line.strip()]
    return [value for record in records for key in ("text", "demonstration") if (value := record.get(key))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target", type=Path, help="folder to write (made if absent)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    parser.add_argument(
        "--corpus",
        type=Path,
        nargs="*",
        default=[],
        help="files (text, or records as .jsonl) that the tokenizer learns from too",
    )
    defaults = TinyShape()
    for name, value in vars(defaults).items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parser.add_argument(option, action="store_true", help="tie the output layer to the embedding")
        else:
            parser.add_argument(option, type=type(value), default=value, help=f"(default: {value})")
    arguments = vars(parser.parse_args())
    target, seed, files = arguments.pop("target"), arguments.pop("seed"), arguments.pop("corpus")
    try:
        corpus = [text for path in files for text in read_corpus(path)]
        num_parameters = make_tiny_policy(target, TinyShape(**arguments), seed=seed, corpus=corpus)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{target}: {num_parameters:,} parameters")


if __name__ == "__main__":
    main()
