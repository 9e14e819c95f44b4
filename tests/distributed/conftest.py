"""The policies that the ranks train, and what transformers makes of them: once for all tests."""

import pickle
from functools import cache

import pytest
from actor_case import make_case, make_sequences
from actor_yardstick import expect
from made_once import made_once


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    def make(folder):
        make_case(folder / "untied", layers=4)
        make_case(folder / "tied", layers=4, tie=True)

    return made_once(tmp_path_factory, "cases", make)


@pytest.fixture(scope="session")
def expected_of(tmp_path_factory):
    """Case → what ``expect`` says of the usual sequences, which takes ten seconds."""

    @cache
    def expected_of(case):
        def make(folder):
            (folder / "expected").write_bytes(pickle.dumps(expect(case, make_sequences)))

        folder = made_once(tmp_path_factory, f"expected-of-{case.name}", make)
        return pickle.loads((folder / "expected").read_bytes())

    return expected_of
