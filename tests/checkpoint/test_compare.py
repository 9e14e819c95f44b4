import json
import math
import re

import pytest
import torch
from random_checkpoint import make_random_checkpoint
from safetensors.torch import load_file, save_file

from perl_megatron.checkpoint.compare import compare_checkpoints, render
from perl_megatron.checkpoint.convert import plan_conversion
from perl_megatron.cli import main


def weights(**changes):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.norm.weight": torch.randn(5, generator=generator),
        "model.layers.0.mlp.up_proj.weight": torch.randn(6, 4, generator=generator).bfloat16(),
        "visual.merger.ln_q.weight": torch.ones(3, dtype=torch.float64),
    }
    return tensors | changes


def folder(path, tensors):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    return str(path)


def test_the_same_bits_are_equal_and_transposed_memory_does_not_matter():
    original = weights()
    again = {name: tensor.clone() for name, tensor in reversed(list(original.items()))}
    name = "model.layers.0.mlp.up_proj.weight"
    again[name] = again[name].t().contiguous().t()
    result = compare_checkpoints(original, again)
    assert result.equal
    assert [row.max_difference for row in result.tensors] == [0.0] * 3
    assert "equal: 3 tensors are the same bits, 0 differ" in render(result)


def test_differences_are_measured_and_come_worst_first():
    small, large = weights()["model.norm.weight"].clone(), weights()["visual.merger.ln_q.weight"].clone()
    small[2] += 0.25
    large[0] -= 3
    result = compare_checkpoints(weights(), weights(**{"model.norm.weight": small, "visual.merger.ln_q.weight": large}))
    assert [row.name for row in result.differing] == ["visual.merger.ln_q.weight", "model.norm.weight"]
    assert result.differing[0].max_difference == 3.0
    assert result.differing[1].max_difference == pytest.approx(0.25, rel=1e-6)
    assert not result.equal


def test_digests_are_printed_for_what_differs_and_for_each_side():
    changed = weights(**{"model.norm.weight": torch.zeros(5)})
    equal, other = compare_checkpoints(weights(), weights()), compare_checkpoints(weights(), changed)
    alone = compare_checkpoints(weights(), weights() | {"more": torch.zeros(1)})
    assert equal.digests[0] == equal.digests[1] == other.digests[0] == alone.digests[0]
    assert len({equal.digests[1], other.digests[1], alone.digests[1]}) == 3
    first, second = (digest[:12] for digest in other.differing[0].digests)
    assert f"model.norm.weight: float32 [5], largest difference 1.5, digests {first} and {second}" in re.sub(
        r"difference \S+,", "difference 1.5,", render(other)
    )
    assert f"digests of all tensors: {other.digests[0][:12]} and {other.digests[1][:12]}" in render(other)
    assert f"digests of all tensors: {equal.digests[0][:12]}\n" in render(equal)
    assert json.loads(other.as_json())["digests"] == list(other.digests)


def test_another_dtype_or_shape_or_sign_of_zero_is_a_difference():
    name = "visual.merger.ln_q.weight"
    for value, difference in ((torch.ones(3), 0.0), (torch.ones(3, 1, dtype=torch.float64), math.inf)):
        (row,) = compare_checkpoints(weights(), weights(**{name: value})).differing
        assert row.max_difference == difference
    zero = torch.zeros(3)
    assert not compare_checkpoints({"a": zero}, {"a": -zero}).equal


def test_nan_and_infinity():
    with_nan = torch.tensor([1.0, math.nan, math.inf])
    assert compare_checkpoints({"a": with_nan}, {"a": with_nan.clone()}).equal
    one_more = torch.tensor([1.5, math.nan, math.inf])
    assert compare_checkpoints({"a": with_nan}, {"a": one_more}).differing[0].max_difference == 0.5
    result = compare_checkpoints({"a": with_nan}, {"a": torch.ones(3)})
    assert math.isnan(result.differing[0].max_difference)
    assert json.loads(result.as_json())["tensors"][0]["max_difference"] == "nan"


def test_a_difference_beyond_the_first_chunk_is_seen(monkeypatch):
    monkeypatch.setattr("perl_megatron.checkpoint.compare._CHUNK", 4)
    changed = torch.zeros(11)
    changed[10] = 2
    assert compare_checkpoints({"a": torch.zeros(11)}, {"a": changed}).differing[0].max_difference == 2.0
    assert compare_checkpoints({"a": torch.zeros(0)}, {"a": torch.zeros(0)}).equal


def test_orphans_and_long_lists():
    many = {f"t{number:02}": torch.zeros(1) for number in range(30)}
    result = compare_checkpoints(many, {})
    assert len(result.only_in_first) == 30
    assert not result.equal
    assert "and 10 more" in render(result)
    assert compare_checkpoints({}, many).only_in_second == result.only_in_first


def test_the_command(tmp_path, capsys):
    original = folder(tmp_path / "a", weights())
    renamed = {
        name.replace("model.", "model.language_model.", 1).replace("visual.", "model.visual.", 1): tensor
        for name, tensor in weights().items()
    }
    other_names = folder(tmp_path / "b", renamed)
    changed = folder(tmp_path / "c", weights(**{"model.norm.weight": torch.zeros(5)}))
    report = tmp_path / "report.json"
    assert main(["verify-weights", original, other_names, "--json", str(report)]) == 0
    assert json.loads(report.read_text())["equal"] is True
    assert main(["verify-weights", original, changed]) == 1
    assert "model.norm.weight" in capsys.readouterr().out
    assert main(["verify-weights", original, changed, "--json", str(tmp_path / "missing" / "report.json")]) == 2
    output = capsys.readouterr()
    assert "--json" in output.err  # before anything is read
    assert output.out == ""


def test_the_command_refuses_what_it_cannot_read(tmp_path, capsys):
    good = folder(tmp_path / "a", weights())
    assert main(["verify-weights", good, str(tmp_path / "missing")]) == 2
    assert "missing" in capsys.readouterr().err
    cut = tmp_path / "a" / "model.safetensors"
    whole = cut.read_bytes()
    broken = folder(tmp_path / "b", weights())
    (tmp_path / "b" / "model.safetensors").write_bytes(whole[:-7])
    assert main(["verify-weights", good, broken]) == 2
    assert "cut short" in capsys.readouterr().err


def test_the_command_reads_every_format(tmp_path, capsys):
    source = make_random_checkpoint(tmp_path / "hf")
    plan_conversion(source, tmp_path / "torch_dist", to="torch_dist", tensor_size=2).run()
    assert main(["verify-weights", str(source), str(tmp_path / "torch_dist")]) == 0
    for file in ("config.json", "manifest.json"):  # a training checkpoint says nothing of the model
        (tmp_path / "torch_dist" / file).unlink()
    assert main(["verify-weights", str(tmp_path / "torch_dist"), str(source)]) == 0
    both = ["verify-weights", str(tmp_path / "torch_dist"), str(tmp_path / "torch_dist")]
    assert main(both) == 2
    assert "config.json" in capsys.readouterr().err
    assert main([*both, "--model", str(source)]) == 0
    changed = load_file(source / "model.safetensors")
    changed["model.layers.2.mlp.gate_proj.weight"][7].neg_()
    save_file(changed, source / "model.safetensors")
    assert main(["verify-weights", str(tmp_path / "torch_dist"), str(source)]) == 1
    assert "differs   model.layers.2.mlp.gate_proj.weight" in capsys.readouterr().out


def test_a_copy_of_the_tied_embedding_is_no_orphan():
    embedding = {"model.embed_tokens.weight": torch.arange(12.0).view(4, 3)}
    with_copy = embedding | {"lm_head.weight": embedding["model.embed_tokens.weight"].clone()}
    assert compare_checkpoints(embedding, with_copy).equal
    result = compare_checkpoints(with_copy, embedding)
    assert result.equal
    assert result.digests[0] == result.digests[1]
    other = embedding | {"lm_head.weight": torch.zeros(4, 3)}
    assert compare_checkpoints(embedding, other).only_in_second == ("lm_head.weight",)
    # The copy stands for nothing where the other side has no embedding either.
    assert compare_checkpoints(with_copy, {}).only_in_first == ("lm_head.weight", "model.embed_tokens.weight")
