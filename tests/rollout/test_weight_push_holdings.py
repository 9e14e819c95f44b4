"""Whether a server holds the policy at all, asked before it is brought weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from perl_megatron.checkpoint.weights import TensorInfo
from perl_megatron.config.schema import RolloutConfig
from perl_megatron.errors import UserError
from perl_megatron.rollout.weight_push import WeightPusher

TENSORS = [("first", TensorInfo((3, 2), torch.float32)), ("second", TensorInfo((4, 5), torch.float32))]
WHOLE = [["first", 0, 3, 0, 2], ["second", 0, 4, 0, 5]]


class PlacesServer:
    """Its workers hold these places."""

    address = "http://a"

    def __init__(self, *workers: list[list[Any]]):
        self.workers, self.num_asked = workers, 0

    def call(self, method: str) -> list[Any]:
        assert method == "perl_places"
        self.num_asked += 1
        return list(self.workers)


def pusher_of(tmp_path: Path, attestation: str = "sample") -> WeightPusher:
    config = RolloutConfig.model_validate({"engine": "server", "attestation": attestation})
    return WeightPusher(config, TENSORS, model_path=tmp_path)


def check(pusher: WeightPusher, server: PlacesServer, identity: str = "x") -> None:
    pusher.check_holdings(identity, server)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [[WHOLE], [[WHOLE[0], ["second", 0, 4, 0, 3]], [WHOLE[0], ["second", 0, 4, 3, 2]]]])
def test_a_server_that_holds_all_is_asked_once_for_each_start(tmp_path: Path, workers: list[Any]) -> None:
    pusher, server = pusher_of(tmp_path), PlacesServer(*workers)
    check(pusher, server)
    check(pusher, server)
    assert server.num_asked == 1
    check(pusher, server, identity="after a restart")
    assert server.num_asked == 2


@pytest.mark.parametrize(
    ("places", "says"),
    [
        (WHOLE[1:], "0 of the 6 numbers of first are held"),
        ([WHOLE[0], ["second", 0, 4, 0, 4]], "16 of the 20 numbers of second are held"),
        ([*WHOLE, ["third", 0, 1, 0, 1]], "third is not among the published weights"),
        ([*WHOLE, ["first", 2, 1, 0, 2]], "overlap"),
    ],
)
def test_a_server_of_another_model_is_refused(tmp_path: Path, places: list[Any], says: str) -> None:
    pusher, server = pusher_of(tmp_path), PlacesServer(places)
    for _ in range(2):  # and is not taken for known
        with pytest.raises(UserError, match="the server http://a are not understood") as caught:
            check(pusher, server)
        assert says in caught.value.what
        assert caught.value.where == "rollout.attestation"


def test_without_attestation_nobody_is_asked(tmp_path: Path) -> None:
    server = PlacesServer([])
    check(pusher_of(tmp_path, "off"), server)
    assert server.num_asked == 0
