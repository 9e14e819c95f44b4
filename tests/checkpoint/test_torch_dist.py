"""torch_dist read and written without megatron-core, against megatron-core (other layouts: tests/distributed)."""

import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from enum import Enum
from pathlib import Path

import pytest
import torch
from megatron_checkpoint import load_policy, parameters, save_policy
from tiny_policy import FFN, HIDDEN, VOCABULARY, hf_model
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.planner import WriteItemType

from perl_megatron.checkpoint.convert import plan_conversion
from perl_megatron.checkpoint.open_weights import open_weights
from perl_megatron.checkpoint.stream import import_weights
from perl_megatron.checkpoint.torch_dist_index import check_index
from perl_megatron.config.schema import ModelConfig, ParallelConfig
from perl_megatron.errors import UserError
from perl_megatron.model.architecture import read_architecture
from perl_megatron.model.policy import build_policy
from perl_megatron.runtime import topology


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """'tied' and 'untied' of Hugging Face, and 'NAME.megatron', the same weights saved by megatron-core."""
    folder = tmp_path_factory.mktemp("torch_dist")
    for name in ("tied", "untied"):
        hf_model(tied=name == "tied").save_pretrained(folder / name)
        with policy(folder / name) as chunks:
            (folder / f"{name}.megatron").mkdir()
            save_policy(chunks, folder / f"{name}.megatron")
    return folder


class policy:
    """The policy in one process, with the weights of a folder."""

    def __init__(self, source: Path):
        self.source = source

    def __enter__(self):
        layout = topology.initialize(ParallelConfig(), seed=0, timeout_seconds=60)
        architecture = read_architecture(self.source)
        chunks = build_policy(architecture, ModelConfig(path=self.source, dtype="float32"), ParallelConfig(), layout)
        import_weights(chunks, architecture, layout, open_weights(self.source))
        return chunks

    def __exit__(self, *failure):
        topology.forget_layout()


@pytest.fixture(scope="module", autouse=True)
def end():
    yield
    topology.shutdown()


def described(path: Path) -> dict:
    """What an index says of every key; chunks in any order."""
    return {
        key: "object"
        if not hasattr(value, "chunks")
        else (value.size, value.properties.dtype, sorted((tuple(c.offsets), tuple(c.sizes)) for c in value.chunks))
        for key, value in FileSystemReader(path).read_metadata().state_dict_metadata.items()
    }


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_megatron_checkpoint_is_read_bit_for_bit(folder, name):
    expected = open_weights(folder / name)
    weights = open_weights(folder / f"{name}.megatron", config=folder / name)
    assert set(weights) == set(expected)
    for tensor_name in reversed(list(expected)):  # in no helpful order
        assert torch.equal(weights[tensor_name], expected[tensor_name]), tensor_name
        assert weights.info(tensor_name) == expected.info(tensor_name)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_index_is_the_one_that_megatron_writes(folder, tmp_path, name):
    plan_conversion(folder / name, tmp_path / "new", to="torch_dist", max_file_bytes=300_000).run()
    assert described(tmp_path / "new") == described(folder / f"{name}.megatron")
    assert len(list((tmp_path / "new").glob("*.distcp"))) > 5


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_megatron_loads_it(folder, tmp_path, name):
    plan_conversion(folder / name, tmp_path / "new", to="torch_dist", tensor_size=2, pipeline_size=2).run()
    with policy(folder / name) as chunks:
        expected = parameters(chunks)
        load_policy(chunks, tmp_path / "new")
        assert all(map(torch.equal, parameters(chunks), expected))


def test_padded_vocabulary_is_cut_off(folder, tmp_path):
    plan_conversion(folder / "untied", tmp_path / "new", to="torch_dist", tensor_size=2).run()
    assert described(tmp_path / "new")["language_model.output_layer.weight"][0] == (VOCABULARY + 1, HIDDEN)
    weights, expected = open_weights(tmp_path / "new"), open_weights(folder / "untied")
    assert torch.equal(weights["lm_head.weight"], expected["lm_head.weight"])


def test_reading_needs_neither_megatron_nor_a_process_group(folder):
    program = (
        "import sys, torch; from pathlib import Path; from perl_megatron.checkpoint.open_weights import open_weights\n"
        f"w = open_weights(Path({str(folder / 'tied.megatron')!r}), config=Path({str(folder / 'tied')!r}))\n"
        f"assert w['model.norm.weight'].shape == ({HIDDEN},)\n"
        "assert not torch.distributed.is_initialized()\n"
        "assert not any(name.startswith('megatron.') for name in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def damaged(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "tied.megatron", tmp_path / "damaged"))


def test_files_that_are_missing_or_cut_short_are_named(folder, tmp_path):
    checkpoint = damaged(folder, tmp_path)
    victim = next(checkpoint.glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1000])
    with pytest.raises(UserError, match=f"(?s)cut short: tensor .*{victim.name}"):
        open_weights(checkpoint, config=folder / "tied")
    victim.unlink()
    with pytest.raises(UserError, match=f"(?s)is missing.*{victim.name}"):
        open_weights(checkpoint, config=folder / "tied")


def test_overwritten_bytes_are_named(folder, tmp_path):
    checkpoint = damaged(folder, tmp_path)
    for file in checkpoint.glob("*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(UserError, match=r"cannot read tensor language_model\.decoder\.final_layernorm\.weight"):
        open_weights(checkpoint, config=folder / "tied")["model.norm.weight"]


class Reduced:
    """Pickled as a call."""

    def __init__(self, function, arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_damaged_index_is_an_error_and_a_hostile_one_does_nothing(folder, tmp_path):
    checkpoint = damaged(folder, tmp_path)
    index = checkpoint / ".metadata"
    index.write_bytes(index.read_bytes()[:1000])
    with pytest.raises(UserError, match="index cannot be read"):
        open_weights(checkpoint, config=folder / "tied")

    index.write_bytes(pickle.dumps(Reduced(Path.touch, (tmp_path / "harm",))))
    with pytest.raises(UserError, match="does not belong into an index"):
        open_weights(checkpoint, config=folder / "tied")
    assert not (tmp_path / "harm").exists()
    for value in (Reduced(getattr, (Path, "touch")), Reduced(getattr, (WriteItemType, "__subclasses__"))):
        index.write_bytes(pickle.dumps(value))
        with pytest.raises(UserError, match="no member of an enumeration"):
            open_weights(checkpoint, config=folder / "tied")
    index.unlink()
    with pytest.raises(UserError, match=r"index .* is missing"):
        open_weights(checkpoint, config=folder / "tied")


@pytest.mark.parametrize("leads", ["..", "/", "absolute"])
def test_an_index_that_names_a_file_outside_is_refused(folder, tmp_path, leads):
    """Also where the file is there, and is the very one."""
    checkpoint = damaged(folder, tmp_path)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    index, storage = next((index, at) for index, at in metadata.storage_data.items() if index.offset is not None)
    (tmp_path / "outside").write_bytes((checkpoint / storage.relative_path).read_bytes())
    name = {"..": "../outside", "/": str(tmp_path / "outside"), "absolute": Path(tmp_path / "outside")}[leads]
    metadata.storage_data[index] = replace(storage, relative_path=name)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    for read in (lambda: open_weights(checkpoint, config=folder / "tied"), lambda: check_index(checkpoint)):
        with pytest.raises(UserError, match=r"(?s)names a file outside the checkpoint: .*outside.*\.metadata"):
            read()


def test_an_index_as_python_3_11_2_writes_it_is_read(folder, tmp_path, monkeypatch):
    """It pickles a member of an enumeration as an attribute of its class."""
    checkpoint = damaged(folder, tmp_path)
    index = checkpoint / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    monkeypatch.setattr(Enum, "__reduce_ex__", lambda member, protocol: (getattr, (type(member), member.name)))
    written = pickle.dumps(metadata)
    assert b"getattr" in written
    index.write_bytes(written)
    assert open_weights(checkpoint, config=folder / "tied").keys() == open_weights(folder / "tied").keys()


def test_another_config_is_refused_and_the_tensors_named(folder):
    with pytest.raises(UserError, match=r"language_model\.output_layer\.weight is missing"):
        open_weights(folder / "tied.megatron", config=folder / "untied")
    with pytest.raises(UserError, match=r"language_model\.output_layer\.weight is not expected"):
        open_weights(folder / "untied.megatron", config=folder / "tied")
    with pytest.raises(UserError, match=r"no config\.json"):
        open_weights(folder / "tied.megatron")


def test_chunks_that_leave_a_gap_are_refused(folder, tmp_path):
    checkpoint = damaged(folder, tmp_path)
    index = checkpoint / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    key = "language_model.decoder.layers.mlp.linear_fc1.weight"
    gone = next(place for place in metadata.storage_data if place.fqn == key and tuple(place.offset) == (1, FFN, 0))
    del metadata.storage_data[gone]
    index.write_bytes(pickle.dumps(metadata))
    weights = open_weights(checkpoint, config=folder / "tied")
    assert weights["model.layers.0.mlp.up_proj.weight"].shape == (FFN, HIDDEN)
    with pytest.raises(UserError, match="do not fill it"):
        weights["model.layers.1.mlp.up_proj.weight"]
