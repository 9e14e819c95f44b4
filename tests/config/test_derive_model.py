from dataclasses import replace

import pytest
from derive_case import TINY

from perl_megatron.config import derive_model
from perl_megatron.config.derive_model import (
    PART_FIELDS,
    check_fp8,
    check_parts,
    check_psutil,
    fp8_alignment,
)
from perl_megatron.config.schema import ModelConfig, OptimizerSection, ParallelConfig
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


PUBLISHED_72B = replace(
    TINY,
    num_layers=80,
    hidden_size=8192,
    ffn_size=29568,
    num_heads=64,
    num_kv_heads=8,
    vocabulary_size=152064,
    vision_ffn_size=3456,
    vision_num_heads=16,
)


def check(parallel=None, **model):
    check_fp8(ModelConfig(path="m", **model), ParallelConfig(**(parallel or {})), PUBLISHED_72B)


def test_fp8_is_refused_without_what_it_needs(monkeypatch):
    monkeypatch.setattr(derive_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed"):
        check(fp8="hybrid")
    monkeypatch.setattr(derive_model.importlib.util, "find_spec", lambda name: name)
    check(fp8="hybrid")
    check(dtype="float32")
    with pytest.raises(UserError, match="float32"):
        check(fp8="hybrid", dtype="float32")


def test_fp8_is_refused_for_matrices_that_are_no_multiples(monkeypatch):
    monkeypatch.setattr(derive_model.importlib.util, "find_spec", lambda name: name)
    check({"tensor": 8}, fp8="hybrid", fp8_recipe="blockwise")
    check({"tensor": 4}, fp8="hybrid", fp8_recipe="mxfp8")
    with pytest.raises(UserError, match=r"multiples of 32.*feed-forward size \(3696\)\n") as refused:
        check({"tensor": 8}, fp8="hybrid", fp8_recipe="mxfp8")  # 115.5 times 32
    assert "parallel.tensor = 8" in refused.value.where


def test_psutil_is_asked_for_before_a_save_hangs(monkeypatch):
    check_psutil()
    monkeypatch.setattr(derive_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="psutil is not installed"):
        check_psutil()


@pytest.mark.parametrize(
    ("fp8", "recipe", "multiple"), [("none", "mxfp8", 1), ("hybrid", "delayed", 16), ("e4m3", "mxfp8", 32)]
)
def test_rows_are_padded_for_fp8(fp8, recipe, multiple):
    assert fp8_alignment(ModelConfig(path="m", fp8=fp8, fp8_recipe=recipe)) == multiple
