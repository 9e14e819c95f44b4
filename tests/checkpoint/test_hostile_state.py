"""A training checkpoint that someone has put programs into: it is refused, and nothing of it runs."""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from actor_case import make_case, make_config, make_encoder

from perl_megatron.config.schema import ParallelConfig
from perl_megatron.errors import UserError
from perl_megatron.runtime import topology as layout
from perl_megatron.train.actor import Actor


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, harm: Path):
        self.harm = harm

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.harm,)


@pytest.fixture(scope="module")
def actor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Actor]:
    case = tmp_path_factory.mktemp("case")
    make_case(case)
    topology = layout.initialize(ParallelConfig(), seed=0, timeout_seconds=60)
    yield Actor(make_config(case), topology, make_encoder(case), total_steps=10)
    layout.shutdown()


@pytest.fixture(scope="module")
def saved(actor: Actor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return actor.save(tmp_path_factory.mktemp("checkpoints"), 1, {})


def test_a_hostile_index_is_refused(actor: Actor, saved: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(saved, tmp_path / "copy"))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "harm")))
    with pytest.raises(UserError, match="does not belong into an index"):
        # Whoever changes a file can change the manifest too: without its digests.
        actor.restore(checkpoint, verify=False)
    assert not (tmp_path / "harm").exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())
    assert (tmp_path / "harm").exists()  # so the file was hostile


def test_a_hostile_common_file_is_refused(actor: Actor, saved: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(saved, tmp_path / "copy"))
    assert (checkpoint / "common.pt").is_file()
    torch.save({"optimizer": Hostile(tmp_path / "harm")}, checkpoint / "common.pt")
    with pytest.raises(UserError, match="does not fit"):
        actor.restore(checkpoint, verify=False)
    assert not (tmp_path / "harm").exists()


def test_a_hostile_object_among_the_tensors_is_refused(actor: Actor, saved: Path, tmp_path: Path) -> None:
    """torch's reader of checkpoints asks for `weights_only=False` for objects. It is put at a data file's end."""
    checkpoint = Path(shutil.copytree(saved, tmp_path / "copy"))
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    index, storage = next((index, at) for index, at in metadata.storage_data.items() if "_extra_state" in index.fqn)
    payload = io.BytesIO()
    torch.save(Hostile(tmp_path / "harm"), payload)
    file = checkpoint / storage.relative_path
    offset = file.stat().st_size
    with file.open("ab") as data:
        data.write(payload.getvalue())
    metadata.storage_data[index] = replace(storage, offset=offset, length=len(payload.getvalue()))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="does not fit"):
        actor.restore(checkpoint, verify=False)
    assert not (tmp_path / "harm").exists()
    actor.restore(saved, verify=False)
