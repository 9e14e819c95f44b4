import pytest

from perl_megatron.config import derive_model
from perl_megatron.config.derive_model import PART_FIELDS, check_fp8, check_parts, fp8_alignment
from perl_megatron.config.schema import ModelConfig, OptimizerSection
from perl_megatron.errors import UserError


@pytest.mark.parametrize("trained", PART_FIELDS)
def test_one_part_is_enough_to_train(trained):
    check_parts(OptimizerSection(**{field: 0.5 if field == trained else 0.0 for field in PART_FIELDS}))


def test_a_wholly_frozen_policy_is_refused():
    with pytest.raises(UserError, match="all frozen") as refused:
        check_parts(OptimizerSection(**dict.fromkeys(PART_FIELDS, 0.0)))
    assert all(f"optimizer.{field}" in refused.value.where for field in PART_FIELDS)


def test_the_fields_are_those_of_the_schema():
    assert set(PART_FIELDS) == {name for name in OptimizerSection.model_fields if name.endswith("_multiplier")}


def test_fp8_is_refused_without_what_it_needs(monkeypatch):
    model = ModelConfig(path="m", fp8="hybrid")
    monkeypatch.setattr(derive_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed"):
        check_fp8(model)
    monkeypatch.setattr(derive_model.importlib.util, "find_spec", lambda name: name)
    check_fp8(model)
    check_fp8(ModelConfig(path="m", dtype="float32"))
    with pytest.raises(UserError, match="float32"):
        check_fp8(ModelConfig(path="m", fp8="hybrid", dtype="float32"))


@pytest.mark.parametrize(
    ("fp8", "recipe", "multiple"), [("none", "mxfp8", 1), ("hybrid", "delayed", 16), ("e4m3", "mxfp8", 32)]
)
def test_rows_are_padded_for_fp8(fp8, recipe, multiple):
    assert fp8_alignment(ModelConfig(path="m", fp8=fp8, fp8_recipe=recipe)) == multiple
