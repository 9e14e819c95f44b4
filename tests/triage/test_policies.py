import pytest
import torch
from recorded_run import SHAPE, mixed
from safetensors.torch import load_file, save_file
from tiny_checkpoint import make_policy

from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.errors import UserError
from perl_megatron.triage.command import triage
from perl_megatron.triage.dump import open_dump
from perl_megatron.triage.policies import GROUPS, Policies, Policy, changed_groups, group_of, stale_mixes


@pytest.fixture(scope="module")
def pair(policies):
    return tuple(Policy(path.name, open_checkpoint(path)) for path in policies)


def test_every_weight_is_in_a_group(pair):
    groups = {name: group_of(name) for name in pair[0].weights}
    assert set(groups.values()) == set(GROUPS)
    assert groups["lm_head.weight"] == "output layer"
    assert groups["model.norm.weight"] == "language layers"
    assert groups["visual.merger.ln_q.weight"] == "merger"
    assert groups["visual.patch_embed.proj.weight"] == "vision tower"


def test_only_parts_that_differ_are_tried(pair, policies, tmp_path):
    first, second = pair
    assert changed_groups(first, second, torch.float32) == set(GROUPS)
    assert len(stale_mixes(first, second, torch.float32)) == 8
    assert stale_mixes(first, first, torch.float32) == {}
    # Norms and biases begin as ones and zeros in both, so that they are not what differs.
    path = mixed(tmp_path / "mixed", policies[0], policies[1], lambda name: name == "lm_head.weight")
    other = Policy("other", open_checkpoint(path))
    assert changed_groups(first, other, torch.float32) == {"output layer"}
    (mix,) = stale_mixes(first, other, torch.float32).values()
    assert mix["output layer"] is other


def test_a_tied_embedding_is_the_output_layer_too(tmp_path):
    first, second = (
        Policy(str(seed), open_checkpoint(make_policy(tmp_path / str(seed), seed=seed, tie=True, **SHAPE)))
        for seed in (0, 1)
    )
    mixes = stale_mixes(first, second, torch.float32)
    assert mixes["output layer: weights of 1"]["output layer"] is second
    assert mixes["output layer: weights of 1"]["embedding"] is first


def test_differences_below_the_runs_dtype_do_not_count(policies, tmp_path):
    path = mixed(tmp_path / "close", policies[0], policies[0], lambda name: name == "lm_head.weight")
    weights = load_file(path / "model.safetensors")
    rounded = {name: tensor.to(torch.bfloat16).float() for name, tensor in weights.items()}
    save_file(rounded, path / "model.safetensors")
    first, close = Policy("a", open_checkpoint(policies[0])), Policy("b", open_checkpoint(path))
    assert changed_groups(first, close, torch.float32) == set(GROUPS)
    assert changed_groups(first, close, torch.bfloat16) == set()
    assert stale_mixes(first, close, torch.bfloat16) == {}


def test_the_runs_own_checkpoints(first_step, policies, tmp_path):
    run = first_step.copy(tmp_path / "run")
    for step, policy in ((1, policies[1]), (4, policies[0])):
        mixed(run.root / "checkpoints" / f"step-{step:08d}", policy, policy, lambda name: True)
    found = Policies(open_dump(run.root), given=None, others=[policies[1]])
    assert found.versions == [0, 1, 4]
    assert found.has(4)
    assert not found.has(2)
    assert found.of_run(2) is None
    expected = found.expected(1)
    assert expected is found.expected(1)
    assert expected.name.startswith("version 1 (")
    names = [each.name.partition(" (")[0] for each in found.candidates(expected)]
    assert names == [str(policies[1]), "version 0", "version 4"]
    given = Policies(open_dump(run.root), given=policies[1], others=[])
    assert given.has(2)
    assert given.expected(2).name == str(policies[1])


def test_weights_of_another_model(first_step, tmp_path):
    small = make_policy(tmp_path / "small", layers=1, vision_depth=2)
    wide = make_policy(tmp_path / "wide", layers=2, vision_depth=2, intermediate=96)
    for path, message in ((small, "lacks model.layers.1"), (wide, "is .*, the run's model has")):
        with pytest.raises(UserError, match=message):
            triage(first_step.root, policy=path, other_policies=(), limit=2)
    with pytest.raises(UserError, match="no such folder"):
        triage(first_step.root, policy=tmp_path / "absent", other_policies=(), limit=2)
