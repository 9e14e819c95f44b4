import dataclasses

import pytest
import torch
from tiny_policy import hf_model

from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.checkpoint.stream import export_weights, import_weights
from perl_megatron.config.schema import ModelConfig, ParallelConfig
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import read_architecture
from perl_megatron.model.policy import build_policy
from perl_megatron.runtime import topology


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(policy chunks, architecture, topology, checkpoint) in this process."""
    folder = tmp_path_factory.mktemp("stream")
    hf_model(tied=False).save_pretrained(folder)
    layout = topology.initialize(ParallelConfig(), seed=0, timeout_seconds=60)
    architecture = read_architecture(folder)
    chunks = build_policy(architecture, ModelConfig(path=folder, dtype="float32"), ParallelConfig(), layout)
    checkpoint = open_checkpoint(folder)
    import_weights(chunks, architecture, layout, checkpoint)
    yield chunks, architecture, layout, checkpoint
    topology.shutdown()


def test_exported_tensors_own_their_memory(loaded):
    chunks, architecture, layout, checkpoint = loaded
    with torch.no_grad():
        for _, tensor in export_weights(chunks, architecture, layout):
            tensor.zero_()
    for name, tensor in export_weights(chunks, architecture, layout):
        assert torch.equal(tensor, checkpoint[name]), name


@pytest.mark.parametrize("bucket_bytes", [1, 100_000, 1 << 30])
def test_buckets_of_any_size_carry_the_same(loaded, bucket_bytes):
    chunks, architecture, layout, checkpoint = loaded
    exported = dict(export_weights(chunks, architecture, layout, bucket_bytes=bucket_bytes, copies=False))
    assert exported.keys() == set(checkpoint)
    assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in exported.items())
    storages = {parameter.untyped_storage().data_ptr() for chunk in chunks for parameter in chunk.parameters()}
    gate = exported["model.layers.0.mlp.gate_proj.weight"]
    assert gate.untyped_storage().data_ptr() in storages  # nothing was copied


def test_checkpoint_orphans_are_listed(loaded):
    chunks, architecture, layout, checkpoint = loaded
    state = dict(checkpoint)
    state["model.layers.0.self_attn.rotary.weight"] = state.pop("model.norm.weight")
    with pytest.raises(UserError) as caught:
        import_weights(chunks, architecture, layout, state)
    assert "only in the checkpoint: ['model.layers.0.self_attn.rotary.weight']" in str(caught.value)
    assert "only in this architecture: ['model.norm.weight']" in str(caught.value)


def test_policy_orphans_are_listed(loaded):
    chunks, architecture, layout, checkpoint = loaded
    policy = chunks[0]
    policy.stray = torch.nn.Parameter(torch.zeros(1))
    norm = policy.language_model.decoder.final_layernorm
    policy.language_model.decoder.final_layernorm = torch.nn.Identity()
    try:
        with pytest.raises(UserError) as caught:
            next(export_weights(chunks, architecture, layout))
        assert "['stray']" in str(caught.value)
        assert "['language_model.decoder.final_layernorm.weight']" in str(caught.value)
        with pytest.raises(UserError, match="stray"):
            import_weights(chunks, architecture, layout, checkpoint.__getitem__)
    finally:
        del policy.stray
        policy.language_model.decoder.final_layernorm = norm


def test_a_tensor_of_another_shape_is_named(loaded):
    chunks, architecture, layout, checkpoint = loaded
    state = dict(checkpoint) | {"model.norm.weight": torch.zeros(5)}
    with pytest.raises(UserError, match=r"model.norm.weight: shape \(5,\) instead of \(192,\)"):
        import_weights(chunks, architecture, layout, state)


def test_an_architecture_with_more_layers_lists_what_lacks(loaded):
    chunks, architecture, layout, checkpoint = loaded
    deeper = dataclasses.replace(architecture, num_layers=5)
    with pytest.raises(UserError, match=r"only in this architecture: \['model.layers.4"):
        import_weights(chunks, deeper, layout, checkpoint)
