import pytest

from perl_megatron.config.derive_model import PART_FIELDS, check_parts
from perl_megatron.config.schema import OptimizerSection
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
