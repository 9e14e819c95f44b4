"""What a tokenizer has to do here, whatever its kind: write answers without loss, and read as it was trained.

transformers takes a SentencePiece ``tokenizer.model`` for whatever class ``tokenizer_config.json`` names, and a wrong
class (or none) does not fail: words fall apart, or spaces are lost. So it is compared with SentencePiece itself. Every
class of transformers 5 that makes a unigram model (T5's, XLNet's, …) splits at white space first and drops line ends.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perl_megatron.errors import UserError

_RESPONSE = "<think>The digits are 3, 7.\n\nSo  7 is larger.</think>\n\\boxed{7}"
_SENTENCE = "Which digit is in image 2? First think about the question, then answer."
"""No normaliser changes it: one line, single spaces, ASCII."""


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Raise UserError where a response would not survive, or ``folder``'s SentencePiece model is read otherwise."""
    ids = tokenizer(_RESPONSE, add_special_tokens=False).input_ids
    written = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if written != _RESPONSE:
        raise UserError(
            f"the tokenizer ({type(tokenizer).__name__}) cannot write a response: {_RESPONSE!r} becomes {written!r}",
            where=str(folder),
            fix=_fix(folder, "use a tokenizer that keeps spaces, line ends, digits and punctuation"),
        )
    model = folder / "tokenizer.model"
    if model.is_file() and not (folder / "tokenizer.json").is_file():
        _check_reading(tokenizer, model)


def _check_reading(tokenizer: Any, model: Path) -> None:
    import sentencepiece

    expected = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(_SENTENCE, out_type=str)
    read = tokenizer.convert_ids_to_tokens(tokenizer(_SENTENCE, add_special_tokens=False).input_ids)
    if read != expected:
        raise UserError(
            f"transformers ({type(tokenizer).__name__}) does not read this SentencePiece model as SentencePiece does: "
            f"{read[:8]} instead of {expected[:8]}",
            where=str(model),
            fix=_fix(model.parent, "convert it to a tokenizer.json"),
        )


def _fix(folder: Path, otherwise: str) -> str:
    if not (folder / "tokenizer.model").is_file():
        return otherwise
    return (
        "for a SentencePiece model of type bpe (with byte_fallback) set tokenizer_class to LlamaTokenizer in "
        "tokenizer_config.json, and add_prefix_space to the model's add_dummy_prefix; no class of transformers reads "
        "one of type unigram without losing spaces and line ends: put a tokenizer.json beside it (a Unigram of its "
        "pieces and scores), and set tokenizer_class to PreTrainedTokenizerFast"
    )
