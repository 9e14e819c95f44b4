import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from random_checkpoint import MAX_FILE_BYTES, assert_same_bits, conversion, make_random_checkpoint
from safetensors.torch import load_file, save_file

from perl_megatron.checkpoint.convert import plan_conversion, render_plan
from perl_megatron.checkpoint.manifest import verify_checkpoint
from perl_megatron.checkpoint.open_weights import open_weights
from perl_megatron.checkpoint.qwen25_vl_table import published_name
from perl_megatron.errors import UserError

UP, Q, EMBEDDING = (
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.embed_tokens.weight",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_random_checkpoint(tmp_path_factory.mktemp("convert") / "source")


@pytest.fixture
def changed(source, tmp_path):
    """A copy of the source with other tensors."""

    def change(**tensors):
        folder = Path(shutil.copytree(source, tmp_path / "changed"))
        weights = load_file(folder / "model.safetensors") | tensors
        weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return change


def assert_nothing_written(folder, name):
    assert not (folder / name).exists()
    assert not (folder / f".{name}.partial").exists()


def test_there_between_layouts_and_back_is_bit_exact_and_needs_nothing_else(source, tmp_path):
    plan_conversion(
        source, tmp_path / "a", to="torch_dist", tensor_size=2, pipeline_size=3, max_file_bytes=MAX_FILE_BYTES
    ).run()
    plan_conversion(tmp_path / "a", tmp_path / "b", to="torch_dist", max_file_bytes=MAX_FILE_BYTES).run()
    plan_conversion(tmp_path / "b", tmp_path / "c", to="hf", max_file_bytes=MAX_FILE_BYTES).run()
    for name in "abc":
        assert_same_bits(tmp_path / name, source)
        for file in ("tokenizer.json", "tokenizer.model", "generation_config.json", "chat_template.jinja"):
            assert (tmp_path / name / file).read_bytes() == (source / file).read_bytes()
        assert json.loads((tmp_path / name / "config.json").read_text()) == json.loads(
            (source / "config.json").read_text()
        )
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 3
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}
    assert {path.name.split("_")[2] for path in (tmp_path / "a").glob("__*")} == set("012345")  # a rank, its files
    assert not {file.name for file in (tmp_path / "c").iterdir()} & {"metadata.json", "manifest.json", ".metadata"}


def test_a_small_model_is_one_file_as_published(source, tmp_path):
    plan_conversion(source, tmp_path / "a", to="torch_dist").run()
    plan_conversion(tmp_path / "a", tmp_path / "b", to="hf").run()
    assert {file.name for file in (tmp_path / "b").iterdir()} == {file.name for file in source.iterdir()}
    assert_same_bits(tmp_path / "b", source)


def test_transformers_loads_what_comes_back_in_shards(source, tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    conversion(source, tmp_path / "a", tensor_size=2).run()
    conversion(tmp_path / "a", tmp_path / "b", "hf").run()
    assert (tmp_path / "b" / "model.safetensors.index.json").is_file()
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "b", output_loading_info=True, dtype="auto"
    )
    assert not any(report.values()), report
    weights = open_weights(source)
    loaded = {published_name(name): parameter for name, parameter in model.named_parameters()}
    assert set(loaded) == set(weights)
    for name, parameter in loaded.items():
        assert torch.equal(parameter.view(torch.int16), weights[name].view(torch.int16)), name


def test_dtype_converts_and_the_config_says_so(source, tmp_path):
    plan_conversion(source, tmp_path / "a", to="torch_dist", dtype=torch.float32).run()
    weights = open_weights(tmp_path / "a")
    assert weights.info(UP).dtype == torch.float32
    assert torch.equal(weights[UP], open_weights(source)[UP].float())
    assert json.loads((tmp_path / "a" / "config.json").read_text())["torch_dtype"] == "float32"


def test_manifest_finds_damage_before_it_is_converted(source, tmp_path):
    plan_conversion(source, tmp_path / "a", to="torch_dist").run()
    verify_checkpoint(tmp_path / "a")
    file = tmp_path / "a" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"(?s)not what was written.*__0_0\.distcp"):
        plan_conversion(tmp_path / "a", tmp_path / "b", to="hf").run()
    assert not (tmp_path / "b").exists()


def test_plan_names_everything_and_reads_no_tensor(source, tmp_path, monkeypatch):
    monkeypatch.setattr("perl_megatron.checkpoint.hf_files.read_tensor", lambda file, stored: pytest.fail("read"))
    lines = list(render_plan(plan_conversion(source, tmp_path / "a", to="torch_dist", tensor_size=2)))
    line = next(line for line in lines if line.startswith(UP))
    assert "[352, 192] bfloat16  135,168 bytes" in line
    assert "language_model.decoder.layers.mlp.linear_fc1.weight[1] GateUp / 2  in __0_0.distcp __1_0.distcp" in line
    weights = open_weights(source)
    total = sum(weights.info(name).nbytes for name in weights)
    assert f"{len(weights)} tensors, {total:,} bytes" in lines[-2]
    assert "tokenizer.model" in lines[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["hf", "torch_dist"])
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({UP: None}, f"tensor {UP} is missing"),
        ({"model.layers.7.x": torch.ones(1)}, r"tensor model\.layers\.7\.x is not expected"),
        ({Q: torch.ones(191).bfloat16()}, rf"tensor {Q} has shape \[191\] instead of \[192\]"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_what_does_not_fit_is_named_before_anything_is_written(changed, tmp_path, tensors, message, to):
    with pytest.raises(UserError, match=message):
        plan_conversion(changed(**tensors), tmp_path / "a", to=to).run()
    assert_nothing_written(tmp_path, "a")


def test_a_config_of_another_model_is_refused(source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(UserError, match=r"(?s)model\.layers\.3\..* is missing.*config\.json"):
        plan_conversion(folder, tmp_path / "a", to="torch_dist")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        plan_conversion(folder, tmp_path / "a", to="torch_dist")


def test_corrupt_and_truncated_files_are_named(source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "cut"))
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    named = r"cut short: tensor (model|visual|lm_head)\.\S+ is"
    for content, what in ((whole[:-1], named), (whole[:100], ""), (b"\xff" * 16 + whole[16:], ""), (b"", "")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"(?s)cannot read the weight file.*{what}.*model\.safetensors"):
            plan_conversion(folder, tmp_path / "a", to="torch_dist")
    assert_nothing_written(tmp_path, "a")


def test_a_source_that_shrinks_meanwhile_names_the_tensor(source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "shrinks"))
    conversion = plan_conversion(folder, tmp_path / "a", to="torch_dist", max_file_bytes=MAX_FILE_BYTES)
    os.truncate(folder / "model.safetensors", 2_000_000)
    with pytest.raises(UserError, match="cannot read tensor "):
        conversion.run()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_a_full_disk_is_told_and_resume_goes_on(source, tmp_path, small_files, to):
    told = r"(?s)cannot write tensor (model|visual)\.\S+: .*free some space.*--resume"
    with small_files(300_000), pytest.raises(UserError, match=told):
        conversion(source, tmp_path / "a", to).run()
    assert not (tmp_path / "a").exists()
    conversion(source, tmp_path / "a", to).run(resume=True)
    assert_same_bits(tmp_path / "a", source)


def test_too_little_space_is_told_before_anything_is_read(source, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1_000_000))
    monkeypatch.setattr("perl_megatron.checkpoint.hf_files.read_tensor", lambda file, stored: pytest.fail("read"))
    with pytest.raises(UserError, match=r"0\.00 GB too little space"):
        plan_conversion(source, tmp_path / "a", to="torch_dist").run()
    assert not (tmp_path / "a").exists()


def test_existing_targets_and_impossible_layouts_are_refused(source, tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="exists"):
        plan_conversion(source, tmp_path / "a", to="hf").run()
    assert list((tmp_path / "a").iterdir()) == []
    for options, message in (
        ({"tensor_size": 3}, "--tp 3"),
        ({"tensor_size": 0}, "--tp 0"),
        ({"pipeline_size": 4}, "--pp 4"),
        ({"to": "hf", "tensor_size": 2}, "no layout"),
    ):
        with pytest.raises(UserError, match=message):
            plan_conversion(source, tmp_path / "b", **({"to": "torch_dist"} | options))


def test_dtypes_that_differ_between_layers_need_a_choice(changed, tmp_path):
    folder = changed(**{UP: torch.zeros(352, 192)})
    with pytest.raises(UserError, match=f"(?s){UP}.*--dtype"):
        plan_conversion(folder, tmp_path / "a", to="torch_dist")
    plan_conversion(folder, tmp_path / "a", to="torch_dist", dtype=torch.bfloat16).run()
    plan_conversion(folder, tmp_path / "b", to="hf", max_file_bytes=MAX_FILE_BYTES).run()
    assert_same_bits(tmp_path / "b", folder)


def tie(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return folder


def test_a_tied_copy_of_the_embedding_is_left_out_and_another_one_refused(source, changed, tmp_path):
    embedding = open_weights(source)[EMBEDDING]
    folder = tie(changed(**{"lm_head.weight": embedding.clone()}))
    plan_conversion(folder, tmp_path / "a", to="torch_dist").run()
    assert "lm_head.weight" not in open_weights(tmp_path / "a")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][-1].neg_()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        plan_conversion(folder, tmp_path / "b", to="torch_dist").run()
    assert not (tmp_path / "b").exists()
