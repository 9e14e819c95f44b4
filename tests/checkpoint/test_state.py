"""Training state on disk, through the actor, in one process (other layouts: tests/distributed)."""

import shutil

import numpy as np
import pytest
from actor_case import make_case, make_config, make_encoder, make_sequences, weights_of, with_log_probs
from megatron.core.dist_checkpointing.validation import determine_global_metadata
from watched_disk import watched_disk

from perl_megatron.checkpoint.convert import plan_conversion
from perl_megatron.checkpoint.open_weights import open_weights
from perl_megatron.config.schema import ParallelConfig
from perl_megatron.errors import UserError
from perl_megatron.runtime import topology as layout
from perl_megatron.train.actor import Actor


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Folders of a policy, and of another one with a layer more."""
    folders = [tmp_path_factory.mktemp(name) for name in ("case", "deeper")]
    for folder, layers in zip(folders, (2, 3), strict=True):
        make_case(folder, layers=layers)
    return folders


@pytest.fixture(scope="module")
def topology():
    yield layout.initialize(ParallelConfig(), seed=0, timeout_seconds=60)
    layout.shutdown()


@pytest.fixture(scope="module")
def encoder(cases):
    return make_encoder(cases[0])


@pytest.fixture
def start(cases, topology, encoder):
    def start(folder=cases[0], **sections):
        return Actor(make_config(folder, **sections), topology, encoder, total_steps=10)

    return start


@pytest.fixture
def sequences(cases, encoder):
    return make_sequences(cases[0], encoder)


def test_who_writes_what_is_found_once_until_the_state_has_other_parts(start, cases, tmp_path, monkeypatch):
    exchanges = []
    monkeypatch.setattr(
        "perl_megatron.checkpoint.state_parts.determine_global_metadata",
        lambda parts: exchanges.append(1) or determine_global_metadata(parts),
    )
    actor, deeper = start(), start(cases[1])
    deeper._checkpoints = actor._checkpoints
    for step, (saved, expected) in enumerate([(actor, 1), (actor, 1), (deeper, 2), (deeper, 2), (actor, 3)]):
        weights = weights_of(saved)
        folder = saved.save(tmp_path / str(step), step, {})
        assert len(exchanges) == expected
        for parameter in saved.modules[0].parameters():
            parameter.data.add_(1)  # the next one has other weights
        other = start(saved.config.model.path.parent)
        other.restore(folder)
        assert all(np.array_equal(value, weights[name]) for name, value in weights_of(other).items())


@pytest.mark.parametrize(("distributed", "dtype"), [(True, "float32"), (False, "float32"), (True, "bfloat16")])
def test_continuing_is_bit_for_bit_the_uninterrupted_run(start, sequences, tmp_path, distributed, dtype):
    sections = {
        "optimizer": {"distributed": distributed, "schedule": "cosine", "min_learning_rate": 1e-6},
        "model": {"dtype": dtype},
    }
    actor = start(**sections)
    log_probs = actor.log_probs(sequences)
    batch = with_log_probs(sequences, log_probs, log_probs, noise=0.3)
    actor.update(batch)
    actor.update(batch)
    checkpoint = actor.save(tmp_path, 2, {"sampler": {"epoch": 1}})
    expected = [actor.update(batch) for _ in range(2)]
    continued = start(**sections)
    assert continued.restore(checkpoint) == {"sampler": {"epoch": 1}}
    assert [continued.update(batch) for _ in range(2)] == expected
    weights = weights_of(actor)
    assert all(np.array_equal(value, weights[name]) for name, value in weights_of(continued).items())


@pytest.mark.parametrize(
    "optimizer",
    [{"distributed": True}, {"distributed": False}, {"distributed": True, "vision_multiplier": 0.0}],
    ids=["distributed optimizer", "optimizer", "frozen vision tower"],
)
def test_a_training_checkpoint_converts_without_its_optimizer(start, sequences, cases, tmp_path, optimizer):
    actor = start(optimizer=optimizer)
    actor.supervised_update(sequences)
    checkpoint, policy = actor.save(tmp_path / "run", 1, {}), cases[0] / "policy"
    plan_conversion(checkpoint, tmp_path / "hf", to="hf", companions_from=policy).run()
    plan_conversion(checkpoint, tmp_path / "cut", to="torch_dist", tensor_size=2, companions_from=policy).run()
    trained, before = weights_of(actor), open_weights(policy)
    for folder in ("hf", "cut"):
        weights = open_weights(tmp_path / folder)
        assert set(weights) == set(trained)
        assert all(np.array_equal(weights[name].numpy(), value) for name, value in trained.items())
    moved = {name for name in trained if not np.array_equal(before[name].float().numpy(), trained[name])}
    frozen = {name for name in trained if name.startswith("visual.") and not name.startswith("visual.merger.")}
    assert moved & frozen == (set() if optimizer.get("vision_multiplier") == 0.0 else frozen)
    assert "lm_head.weight" in moved or "model.embed_tokens.weight" in moved


def test_a_checkpoint_is_taken_up_with_the_configured_rates(start, sequences, tmp_path):
    actor = start(optimizer={"learning_rate": 1e-4, "schedule": "linear"})
    actor.supervised_update(sequences)
    checkpoint = actor.save(tmp_path, 1, {})
    other = start(optimizer={"learning_rate": 5e-4, "schedule": "linear"})
    other.restore(checkpoint)
    assert other.supervised_update(sequences)["learning_rate"] == pytest.approx(5e-4 * 0.8)


def test_a_damaged_checkpoint_names_the_file(start, tmp_path):
    actor = start()
    checkpoint = actor.save(tmp_path, 1, {})
    shutil.copytree(checkpoint, tmp_path / "good")
    victim = next(checkpoint.glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(UserError, match=victim.name):
        actor.restore(checkpoint)
    actor.restore(tmp_path / "good")


def test_a_checkpoint_of_another_policy_is_refused(start, cases, tmp_path):
    checkpoint = start().save(tmp_path, 1, {})
    with pytest.raises(UserError, match="does not fit"):
        start(cases[1]).restore(checkpoint)


def test_a_power_failure_takes_nothing_of_a_checkpoint(start, tmp_path):
    actor = start()
    with watched_disk() as disk:
        checkpoint = actor.save(tmp_path, 1, {})
    assert (checkpoint / "metadata.json").is_file()
    assert disk.lost() == []


def test_what_is_not_json_is_refused_before_anything_is_written(start, tmp_path):
    with pytest.raises(TypeError):
        start().save(tmp_path / "new", 1, {"array": np.zeros(2)})
    assert not (tmp_path / "new").exists()


def test_old_checkpoints_are_deleted(start, tmp_path):
    actor = start(run={"keep_checkpoints": 1})
    actor.save(tmp_path, 1, {})
    actor.save(tmp_path, 2, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
