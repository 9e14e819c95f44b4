import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_policy import HIDDEN, hf_model

from perl_megatron.checkpoint.hf_files import open_checkpoint, save_checkpoint
from perl_megatron.checkpoint.safetensors_format import LENGTH_BYTES
from perl_megatron.checkpoint.safetensors_writer import HEADER_BYTES
from perl_megatron.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    hf_model(tied=False).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.mark.parametrize("max_shard_bytes", [10**9, 10**5], ids=["one file", "shards"])
def test_saved_folder_loads_in_transformers_and_here(source, tmp_path, max_shard_bytes):
    from transformers import Qwen2_5_VLForConditionalGeneration

    weights = open_checkpoint(source)
    target = tmp_path / "saved"
    save_checkpoint(target, weights.items(), source, max_shard_bytes=max_shard_bytes)
    shards = sorted(target.glob("*.safetensors"))
    assert (len(shards) == 1) == (max_shard_bytes == 10**9)
    largest = max(tensor.nbytes for tensor in weights.values())
    assert all(shard.stat().st_size <= max(max_shard_bytes, largest) + LENGTH_BYTES + HEADER_BYTES for shard in shards)
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(target, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    assert (target / "tokenizer.json").exists()
    assert (target / "chat_template.jinja").exists()
    again = open_checkpoint(target)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert list(tmp_path.iterdir()) == [target]


def test_config_says_the_dtype_that_was_written(source, tmp_path):
    weights = open_checkpoint(source)
    save_checkpoint(tmp_path / "half", ((name, weights[name].bfloat16()) for name in weights), source)
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_a_failing_stream_leaves_no_target(source, tmp_path):
    def broken():
        yield "model.norm.weight", torch.zeros(HIDDEN)
        raise RuntimeError("rank lost")

    with pytest.raises(RuntimeError):
        save_checkpoint(tmp_path / "saved", broken(), source)
    assert not (tmp_path / "saved").exists()
    save_checkpoint(tmp_path / "saved", open_checkpoint(source).items(), source)  # what was left is no hindrance
    assert len(open_checkpoint(tmp_path / "saved")) == len(open_checkpoint(source))


def test_an_interruption_leaves_only_the_partial_folder(source, tmp_path):
    def interrupted():
        yield "model.norm.weight", torch.zeros(HIDDEN)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "saved", interrupted(), source)
    assert [path.name for path in tmp_path.iterdir()] == [".saved.export"]
    with pytest.raises(UserError, match="does not exist"):
        open_checkpoint(tmp_path / ".saved.export")


def test_an_export_leaves_an_interrupted_conversion_alone(source, tmp_path):
    (tmp_path / ".saved.partial").mkdir()
    save_checkpoint(tmp_path / "saved", [("a", torch.zeros(1))], source)
    assert {path.name for path in tmp_path.iterdir()} == {"saved", ".saved.partial"}


def test_a_full_disk_is_told_and_leaves_nothing(source, tmp_path, small_files):
    weights = [("first", torch.zeros(1000)), ("second", torch.zeros(100_000)), ("third", torch.zeros(1))]
    with (
        small_files(HEADER_BYTES + 100_000),
        pytest.raises(UserError, match=r"(?s)tensor second: .*\.shard.*free some"),
    ):
        save_checkpoint(tmp_path / "saved", weights, source)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_after_the_weights_leaves_nothing(source, tmp_path, small_files):
    (source_copy := tmp_path / "source").mkdir()
    (source_copy / "tokenizer.json").write_text(" " * 2 * HEADER_BYTES)
    (tmp_path / "out").mkdir()
    with small_files(HEADER_BYTES + 1000), pytest.raises(UserError, match="cannot write the checkpoint"):
        save_checkpoint(tmp_path / "out" / "saved", [("a", torch.zeros(1))], source_copy)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("max_shard_bytes", [10**9, 16], ids=["one file", "shards"])
def test_a_tensor_that_comes_twice_is_refused(source, tmp_path, max_shard_bytes):
    weights = [("a", torch.zeros(4)), ("b", torch.zeros(4)), ("a", torch.zeros(4))]
    with pytest.raises(UserError, match="tensor a comes twice"):
        save_checkpoint(tmp_path / "saved", weights, source, max_shard_bytes=max_shard_bytes)
    assert list(tmp_path.iterdir()) == []


def test_what_one_file_cannot_hold_goes_to_the_next(source, tmp_path):
    # float32 after three bytes would not be aligned; and the header's room ends before 3,000 names of this length.
    mixed = [("bytes", torch.arange(3, dtype=torch.uint8)), ("floats", torch.arange(3.0))]
    many = [(f"{number:0100d}", torch.tensor([number])) for number in range(3000)]
    save_checkpoint(tmp_path / "saved", [*mixed, *many], source)
    saved = open_checkpoint(tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 2
    assert all(torch.equal(saved[name], tensor) for name, tensor in [*mixed, *many])
    assert len(saved) == 3002


def test_existing_target_is_refused_and_untouched(source, tmp_path):
    with pytest.raises(UserError, match="exists"):
        save_checkpoint(tmp_path, open_checkpoint(source).items(), source)
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_do_not_write_draw_the_stream_to_its_end(source, tmp_path):
    drawn = []
    stream = ((drawn.append(name), (name, tensor))[1] for name, tensor in open_checkpoint(source).items())
    save_checkpoint(tmp_path / "saved", stream, source, write=False)
    assert len(drawn) == len(open_checkpoint(source))
    assert list(tmp_path.iterdir()) == []


def test_names_in_memory_and_published_names_are_one(tmp_path):
    tensors = {"model.language_model.norm.weight": torch.arange(3.0), "model.visual.merger.ln_q.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint) == {"model.norm.weight", "visual.merger.ln_q.weight"}
    assert torch.equal(checkpoint["model.norm.weight"], torch.arange(3.0))


def test_one_file_beside_an_index_is_what_is_read_as_transformers_does(source, tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    weights = open_checkpoint(source)
    save_checkpoint(tmp_path / "both", weights.items(), source, max_shard_bytes=10**5)
    changed = {name: tensor + 1 if name == "lm_head.weight" else tensor for name, tensor in weights.items()}
    save_file(changed, tmp_path / "both" / "model.safetensors", metadata={"format": "pt"})
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "both").lm_head.weight
    assert torch.equal(theirs, changed["lm_head.weight"])
    assert torch.equal(open_checkpoint(tmp_path / "both")["lm_head.weight"], theirs)


def test_missing_tensor_is_named(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no tensor b"):
        open_checkpoint(tmp_path)["b"]


def test_missing_and_truncated_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"(?s)cut short.*model\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_file_that_shrinks_while_open_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000), "b": torch.ones(1000)}, file)
    checkpoint = open_checkpoint(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    assert torch.equal(checkpoint["a"], torch.ones(1000))
    with pytest.raises(UserError, match=r"(?s)tensor b: .*100 bytes too early.*model\.safetensors"):
        checkpoint["b"]


def test_a_tensor_in_two_places_is_named(tmp_path):
    save_file({"visual.merger.ln_q.weight": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"model.visual.merger.ln_q.weight": torch.ones(1)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"visual.merger.ln_q.weight": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"visual\.merger\.ln_q\.weight is there twice: in one\..* and in two\."):
        open_checkpoint(tmp_path)


def test_index_that_promises_too_much_is_named(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    with pytest.raises(UserError, match=r"\['b'\]"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(UserError, match=r"two\.safetensors"):
        open_checkpoint(tmp_path)
    for unreadable in ("{", "[]", '{"weight_map": []}', "{}"):
        index.write_text(unreadable)
        with pytest.raises(UserError, match="cannot read the index"):
            open_checkpoint(tmp_path)


def test_a_torch_dist_folder_is_refused_with_the_command_that_converts_it(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"")
    with pytest.raises(UserError, match=r"(?s)torch_dist checkpoint.*convert_checkpoint\.py .* --to hf"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("leads", ["..", "/"])
def test_an_index_that_names_a_file_outside_is_refused(tmp_path, leads):
    outside = tmp_path / "outside.safetensors"
    save_file({"a": torch.zeros(1)}, outside)
    (tmp_path / "policy").mkdir()
    name = {"..": "../outside.safetensors", "/": str(outside)}[leads]
    index = tmp_path / "policy" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=f"(?s)names a file outside the checkpoint: '{name}'.*{index.name}"):
        open_checkpoint(tmp_path / "policy")
