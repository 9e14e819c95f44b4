import pytest

from perl_megatron.checkpoint.model_digest import model_digest
from perl_megatron.errors import UserError


def test_model_digest_sees_other_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(5 * 2**20))
    before = model_digest(tmp_path)
    (tmp_path / "notes.md").write_text("not the model")
    assert model_digest(tmp_path) == before
    weights.write_bytes(bytes(5 * 2**20 - 1) + b"x")
    assert model_digest(tmp_path) != before


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read the model"):
        model_digest(tmp_path / "none")
