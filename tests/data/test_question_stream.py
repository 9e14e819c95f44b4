from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from perl_megatron.data.question_stream import DrawChecks, LookAhead, QuestionStream
from perl_megatron.data.sampler import MixtureSampler, ShuffledSampler
from perl_megatron.errors import UserError
from perl_megatron.runtime import collective
from perl_megatron.types import Record

RECORDS = [Record(f"r{n}", (Path(f"{n}.png"),), "<image>?", "7", source=f"x.jsonl:{n}") for n in range(20)]


class Problems:
    """Finds problems with the records whose number is ``bad``, and keeps what it was asked."""

    def __init__(self, *bad: int, max_corrupt_fraction: float = 1.0):
        self.bad, self.checked = {f"r{n}" for n in bad}, []
        self.checks = DrawChecks(self.problem_of, max_corrupt_fraction, "x.jsonl")

    def problem_of(self, record: Record) -> str | None:
        self.checked.append(record.id)
        return "it is bad" if record.id in self.bad else None


class Expected(list):
    """What images were expected, call by call."""

    def __call__(self, images) -> None:
        self.append([image.stem for image in images])


def test_without_checks_it_is_the_sampler():
    stream = QuestionStream(RECORDS, ShuffledSampler(20, 1))
    drawn = stream.next(30)
    assert [question.record for question in drawn] == [RECORDS[n] for n in ShuffledSampler(20, 1).next(30)]
    assert [question.draw_index for question in drawn] == list(range(30))
    assert (stream.num_drawn, stream.num_records) == (30, 20)
    assert {question.problem for question in drawn} == {None}


@given(bad=st.sets(st.integers(0, 19), max_size=8), counts=st.lists(st.integers(0, 25), max_size=6))
@example(bad=set(range(12)), counts=[2, 25, 25])
@settings(max_examples=50, deadline=None)
def test_bad_records_are_passed_over_and_the_order_stays(bad, counts):
    problems = Problems(*bad)
    stream = QuestionStream(RECORDS, ShuffledSampler(20, 1), problems.checks)
    drawn = []
    for count in counts:
        part = stream.next(count)
        assert sum(question.problem is None for question in part) == count
        drawn += part
    assert [question.draw_index for question in drawn] == list(range(stream.num_drawn))
    assert [question.record for question in drawn] == [RECORDS[n] for n in ShuffledSampler(20, 1).next(len(drawn))]
    assert all((question.problem is not None) == (question.record.id in problems.bad) for question in drawn)
    assert all(problems.checked.count(record) == 1 for record in problems.bad & set(problems.checked))


def test_a_resumed_stream_goes_on_as_if_nothing_had_happened():
    whole = QuestionStream(RECORDS, MixtureSampler([5, 15], [1, 1], 1), Problems(3, 9).checks)
    expected = [*whole.next(7), *whole.next(30)]
    first = QuestionStream(RECORDS, MixtureSampler([5, 15], [1, 1], 1), Problems(3, 9).checks)
    begun = first.next(7)
    second = QuestionStream(RECORDS, MixtureSampler([5, 15], [1, 1], 1), Problems(3, 9).checks)
    second.load_state_dict(first.state_dict())
    assert [*begun, *second.next(30)] == expected


def test_no_more_are_drawn_than_the_limit():
    stream = QuestionStream(RECORDS, ShuffledSampler(20, 1), Problems(*range(10)).checks)
    assert len(stream.next(10, limit=6)) == 6
    assert len(stream.next(2, limit=0)) == 0
    assert stream.num_drawn == 6


@pytest.mark.parametrize("checks", [Problems().checks, None], ids=["as drawn", "at load"])
def test_images_are_expected_before_they_are_needed(checks):
    expected = Expected()
    stream = QuestionStream(RECORDS, ShuffledSampler(20, 1), checks, LookAhead(expected, 4))
    order = [str(n) for n in ShuffledSampler(20, 1).next(20)]
    stream.prepare()
    stream.next(4)
    stream.next(4)
    stream.next(6)
    assert expected == [order[0:4], order[0:8], order[4:12], order[8:20]]


def test_questions_drawn_again_leave_the_images_of_the_next_step_expected():
    expected = Expected()
    stream = QuestionStream(RECORDS, ShuffledSampler(20, 1), Problems().checks, LookAhead(expected, 6))
    order = [str(n) for n in ShuffledSampler(20, 1).next(20)]
    stream.next(6)
    stream.next(1)
    assert expected[-1] == order[6:13]
    stream.next(2)
    assert expected[-1] == order[7:15]


def test_images_of_questions_that_cannot_be_asked_are_not_expected_again():
    expected = Expected()
    stream = QuestionStream(RECORDS, ShuffledSampler(20, 1), Problems(*range(0, 20, 2)).checks, LookAhead(expected, 20))
    stream.next(20, limit=20)
    stream.load_state_dict(ShuffledSampler(20, 1).state_dict())
    stream.prepare()
    assert sorted(expected[-1], key=int) == [str(n) for n in range(1, 20, 2)]


class CountedRecords(list):
    """Counts how often a record is read."""

    num_read = 0

    def __getitem__(self, index):
        self.num_read += 1
        return super().__getitem__(index)


def test_records_are_not_read_again_for_every_draw():
    records = CountedRecords([*RECORDS[:19], Record("r19", (), "?", "7", source="x.jsonl:19")])
    stream = QuestionStream(records, ShuffledSampler(20, 1), None, LookAhead(Expected(), 10))
    for _ in range(10):
        stream.next(1)
    assert records.num_read == 20 + 10  # for its images, and when it is drawn


def test_too_many_bad_records_end_the_run_with_their_names(caplog):
    stream = QuestionStream(RECORDS, ShuffledSampler(20, 1), Problems(4, 5, max_corrupt_fraction=0.05).checks)
    with pytest.raises(UserError, match=r"(?s)2 of 20 records cannot be used.*x\.jsonl:[45] \(r[45]\): it is bad"):
        stream.next(20)
    assert caplog.text.count("it is bad") == 2
    with pytest.raises(UserError, match="20 of 20"):
        QuestionStream(RECORDS, ShuffledSampler(20, 1), Problems(*range(20)).checks).next(1)


def test_a_problem_of_one_rank_is_a_problem_of_all(monkeypatch):
    bad = ShuffledSampler(20, 1).next(3)[2]
    monkeypatch.setattr(collective, "gather_objects", lambda mine: [mine, {bad: "only there"}])
    stream = QuestionStream(RECORDS, ShuffledSampler(20, 1), Problems().checks)
    drawn = stream.next(19)
    assert len(drawn) == 20
    assert [question.record.id for question in drawn if question.problem == "only there"] == [f"r{bad}"]
