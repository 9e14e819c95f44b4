"""What is refused, and which backend is chosen."""

import pytest
import torch
from loss_case import make_case

from perl_megatron.errors import UserError
from perl_megatron.kernels import dispatch, native
from perl_megatron.kernels.dispatch import score_tokens
from perl_megatron.kernels.scores import ScoreOptions, VocabularyShard

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(7, 5)}, "does not fit"),
        ({"hidden": torch.zeros(7, 6, dtype=torch.bfloat16)}, r"torch.bfloat16 and the output weight is torch.float32"),
        ({"targets": torch.zeros(6, dtype=torch.int64)}, "targets must be"),
        ({"targets": torch.zeros(7)}, "targets must be"),
        ({"shard": VocabularyShard(0, 24, 24)}, "cannot hold"),
        ({"shard": VocabularyShard(20, 10, 23)}, "cannot hold 10 of 23 tokens from 20 on"),
        ({"shard": VocabularyShard(-1, 3, 23)}, "cannot hold"),
        ({"options": ScoreOptions(temperature=0.0)}, "temperature"),
        ({"options": ScoreOptions(temperature=torch.ones(3))}, "temperature"),
        ({"options": ScoreOptions(temperature=torch.ones(7, dtype=torch.int64))}, "temperature"),
        ({"options": ScoreOptions(top_k=24)}, "top_k is 24 of 23"),
        ({"options": ScoreOptions(banned_token_ids=(23,))}, "banned"),
        ({"options": ScoreOptions(gradient_buffer=torch.zeros(3, 6))}, "buffer"),
    ],
)
def test_inputs_that_do_not_go_together_are_refused(changed, message):
    case = make_case(dtype=torch.float32)
    arguments = {"hidden": case.hidden, "weight": case.weight, "targets": case.targets}
    with pytest.raises(ValueError, match=message):
        score_tokens(**arguments | changed)


def test_the_fastest_is_chosen():
    assert dispatch.choose_backend("auto", CPU) == "tiled"
    assert dispatch.choose_backend("reference", CPU) == "reference"


def test_what_the_doctor_says_of_it(monkeypatch):
    assert dispatch.describe("reference") == "reference"
    monkeypatch.setattr(native, "why_not", lambda: None)
    assert dispatch.describe("tiled") == "tiled, inner loops in C++"
    monkeypatch.setattr(native, "why_not", lambda: "no AVX-512")
    assert dispatch.describe("tiled") == "tiled, inner loops in torch: no AVX-512"


def test_a_backend_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"'triton' cannot run here.*\n.*model.loss_kernel=triton\n.*=auto"):
        dispatch.choose_backend("triton", CPU)
