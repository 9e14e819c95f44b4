import pytest
import torch
from recorded_run import Transformers, make_policies, record_run


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Matrices this small gain nothing from several threads, which only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def policies(tmp_path_factory):
    """Two policies (untied)."""
    return make_policies(tmp_path_factory.mktemp("policies"))


@pytest.fixture(scope="session")
def first_step(tmp_path_factory, policies):
    """Step 1, sampled with the first policy, which is the run's model.path; do not change it, copy it."""
    return record_run(tmp_path_factory.mktemp("first"), policies[0], policies[0])


@pytest.fixture(scope="session")
def second_step(tmp_path_factory, policies):
    """Step 2, sampled with the second policy; the run's model.path is the first."""
    return record_run(tmp_path_factory.mktemp("second"), policies[0], policies[1], step=2)


@pytest.fixture(scope="session")
def teacher(policies, first_step):
    """transformers with the first policy."""
    return Transformers(policies[0], first_step.encoder)
