"""A policy whose tokenizer is a SentencePiece `tokenizer.model` (trained here) loads as one with Qwen's BPE does."""

import io
import json

import pytest
import sentencepiece
from tiny_checkpoint import make_images, make_policy, make_view, tool
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram

from perl_megatron.data.processor import VISION_TOKENS, PromptEncoder
from perl_megatron.errors import UserError

_STRIPS = ("lstrip", "rstrip", "single_word")


def train(**options) -> bytes:
    model = io.BytesIO()
    settings = {
        "vocab_size": 400,
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "user_defined_symbols": tool().RESPONSE_TOKENS,
        "sentence_iterator": iter(tool().CORPUS),
    }
    sentencepiece.SentencePieceTrainer.train(model_writer=model, num_threads=1, minloglevel=2, **settings | options)
    return model.getvalue()


@pytest.fixture(scope="module")
def write_policy(tmp_path_factory):
    """A function that writes a policy's folder with this SentencePiece model, its special tokens behind the pieces."""

    def write(model: bytes, **tokenizer_config):
        folder = make_policy(tmp_path_factory.mktemp("policy"))
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(model)
        first = len(sentencepiece.SentencePieceProcessor(model_proto=model))
        ids = {token: first + number for number, token in enumerate(tool().SPECIAL_TOKENS)}
        added = {
            str(index): {"content": token, "special": True, "normalized": False} | dict.fromkeys(_STRIPS, False)
            for token, index in ids.items()
        }
        settings = {
            "tokenizer_class": "LlamaTokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "add_prefix_space": False,
            "added_tokens_decoder": added,
        }
        kept = {name: value for name, value in (settings | tokenizer_config).items() if value != "left out"}
        (folder / "tokenizer_config.json").write_text(json.dumps(kept))
        config = json.loads((folder / "config.json").read_text())
        for name in ("image", "video"):
            config[f"{name}_token_id"] = ids[f"<|{name}_pad|>"]
        config["text_config"] |= {
            "vocab_size": first + len(ids),
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        }
        (folder / "config.json").write_text(json.dumps(config))
        generation = {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]}
        (folder / "generation_config.json").write_text(json.dumps(generation))
        return folder

    return write


@pytest.fixture(scope="module")
def model():
    return train()


@pytest.fixture(scope="module")
def encoder(write_policy, model):
    return PromptEncoder(write_policy(model), system_prompt="Think first.")


def test_it_reads_as_sentencepiece_does(encoder, model):
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in ("Which digit is in image 2?", "3, 1,  2\n\né 漢 <think>375</think> \\boxed{7}", " a", ""):
        assert encoder.tokenizer(text, add_special_tokens=False).input_ids == original.encode(text)


@pytest.mark.parametrize("text", ["<think>3, 71</think> \\boxed{é 5}", "two  spaces\n\nand lines ", " 漢字\t✓", "x"])
def test_a_response_ends_its_turn_and_decodes_to_itself(encoder, text):
    ids = encoder.encode_response(text)
    assert ids[-1] == encoder.turn_end_id
    assert encoder.decode(ids) == text


def test_vision_tokens_have_the_models_ids(encoder):
    assert encoder.image_token_id == 400 + tool().SPECIAL_TOKENS.index("<|image_pad|>")
    assert set(encoder.banned_token_ids) == {400 + tool().SPECIAL_TOKENS.index(token) for token in VISION_TOKENS}
    assert encoder.end_token_ids == (402, 400)
    assert encoder.pad_token_id == 400
    assert encoder.vocabulary_size == len(encoder.tokenizer) == 408


@pytest.mark.parametrize("sizes", [[], [(28, 28)], [(56, 84), (28, 28), (100, 131)]], ids=len)
def test_prompts_with_images_have_the_published_shape(encoder, tmp_path, sizes):
    prompt = encoder.encode(make_view(make_images(tmp_path, sizes), question="Which?"))
    images = "".join(f"Image {slot + 1}: <|vision_start|><|image_pad|><|vision_end|> " for slot in range(len(sizes)))
    assert encoder.tokenizer.decode(prompt.compact_ids, clean_up_tokenization_spaces=False) == (
        "<|im_start|>system\nThink first.<|im_end|>\n"
        f"<|im_start|>user\n{images}Which?<|im_end|>\n<|im_start|>assistant\n"
    )
    for start, grid in zip(prompt.image_starts, prompt.grids, strict=True):
        count = int(grid.prod()) // 4
        assert (prompt.token_ids[start : start + count] == encoder.image_token_id).all()
        assert prompt.token_ids[start - 1] != encoder.image_token_id != prompt.token_ids[start + count]
    assert (prompt.token_ids == encoder.image_token_id).sum() == prompt.grids.prod(axis=1).sum() // 4


def test_special_tokens_in_a_users_text_are_refused(encoder):
    with pytest.raises(UserError, match="special token"):
        encoder.encode_response("<|image_pad|>")


def test_a_model_with_a_space_before_every_text(write_policy):
    model = train(add_dummy_prefix=True)
    encoder = PromptEncoder(write_policy(model, add_prefix_space=True), system_prompt="")
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert encoder.tokenizer("Which digit?", add_special_tokens=False).input_ids == original.encode("Which digit?")
    assert encoder.decode(encoder.encode_response("x  y\n")) == "x  y\n"


@pytest.mark.parametrize("name", ["left out", "Qwen2Tokenizer"])
def test_a_class_that_loses_spaces_is_refused(write_policy, model, name):
    with pytest.raises(UserError, match=r"(?s)cannot write a response.*set tokenizer_class to LlamaTokenizer"):
        PromptEncoder(write_policy(model, tokenizer_class=name), system_prompt="")


@pytest.mark.parametrize(
    ("options", "settings"),
    [({"model_type": "unigram", "vocab_size": 380}, {}), ({}, {"add_prefix_space": True})],
    ids=["unigram", "prefix space"],
)
def test_a_model_that_would_be_read_otherwise_is_refused(write_policy, options, settings):
    with pytest.raises(UserError, match=r"(?s)does not read.*tokenizer\.model.*one of type unigram"):
        PromptEncoder(write_policy(train(**options), **settings), system_prompt="")


def unigram_tokenizer(model: bytes) -> Tokenizer:
    """A tokenizer.json for a SentencePiece model of type unigram that changes no space (identity, no dummy prefix)."""
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [(original.id_to_piece(index), original.get_score(index)) for index in range(len(original))]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=original.unk_id(), byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def test_a_unigram_model_is_read_through_a_tokenizer_json(write_policy):
    model = train(model_type="unigram", vocab_size=380)
    folder = write_policy(model, tokenizer_class="PreTrainedTokenizerFast")
    unigram_tokenizer(model).save(str(folder / "tokenizer.json"))
    encoder = PromptEncoder(folder, system_prompt="")
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in ("Which digit is in image 2?", "3, 1,  2\n\né 漢 <think>375</think> \\boxed{7}", " a", ""):
        assert encoder.tokenizer(text, add_special_tokens=False).input_ids == original.encode(text)
        assert encoder.decode(encoder.encode_response(text)) == text
    assert encoder.image_token_id == 380 + tool().SPECIAL_TOKENS.index("<|image_pad|>")


def test_a_model_without_line_ends_is_refused(write_policy):
    corpus = " ".join(tool().CORPUS).replace("\n", " ")
    model = train(byte_fallback=False, vocab_size=200, sentence_iterator=iter([corpus]))
    with pytest.raises(UserError, match="cannot write a response"):
        PromptEncoder(write_policy(model), system_prompt="")


def test_a_damaged_model_is_refused(write_policy, model):
    folder = write_policy(model)
    (folder / "tokenizer.model").write_bytes(model[:-100])
    with pytest.raises(UserError, match=r"(?s)cannot read tokenizer.*tokenizer\.model"):
        PromptEncoder(folder, system_prompt="")
