"""What has to hold for a record besides its contract. No torch: processes that only check records import this file."""

from __future__ import annotations

from perl_megatron.reward.grade import check_expected
from perl_megatron.types import Record


def check_answer(record: Record) -> None:
    """Refuse a record whose answer could never be matched. Raises UserError."""
    check_expected(
        record.answer,
        record.answer_type,
        where=record.source or f"record '{record.id}'",
        grading=record.grading,
        option_slots=record.contract.option_slots,
        num_images=len(record.images),
    )
