"""The policies that the ranks train."""

import pytest
from actor_case import make_case


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    make_case(folder / "untied", layers=4)
    make_case(folder / "tied", layers=4, tie=True)
    return folder
