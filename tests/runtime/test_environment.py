import os

import pytest

from perl_megatron.runtime import environment


@pytest.fixture
def variables(monkeypatch):
    """An environment of the test's own."""
    monkeypatch.setattr(os, "environ", {"LOCAL_WORLD_SIZE": "2", "VLLM_LOGGING_LEVEL": "DEBUG"})
    return os.environ


def test_a_users_own_value_wins(variables):
    environment.prepare_vllm(cuda=False)
    assert variables["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert variables["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_a_gpu_machine_keeps_compilation(variables):
    environment.prepare_process()
    environment.prepare_vllm(cuda=True)
    assert not {"TORCH_COMPILE_DISABLE", "VLLM_CPU_OMP_THREADS_BIND"} & variables.keys()
    assert variables["HF_HUB_OFFLINE"] == "1"


def test_what_vllm_rewrites_is_put_back(variables):
    with environment.vllm_leaves_alone():
        variables["LOCAL_WORLD_SIZE"] = "1"
        variables["LD_PRELOAD"] = "libtcmalloc.so"
    assert variables["LOCAL_WORLD_SIZE"] == "2"
    assert "LD_PRELOAD" not in variables


@pytest.mark.parametrize(("ranks", "cores"), [("1", 4), ("2", 2), ("3", 1), ("8", 1)])
def test_ranks_share_the_cores_of_their_machine(variables, monkeypatch, ranks, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 4, 5})
    variables["LOCAL_WORLD_SIZE"] = ranks
    assert environment.cores_of_this_process() == cores
