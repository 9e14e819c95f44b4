"""Which rows a fault fails: real findings of one process, spoilt one by one."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from perl_megatron.checkpoint import stream
from perl_megatron.checkpoint.hf_files import open_checkpoint
from perl_megatron.cli import main
from perl_megatron.runtime import topology
from perl_megatron.verification.command import make_case, shared_folder
from perl_megatron.verification.judge import CEILING, MULTIPLE, judge
from perl_megatron.verification.layout import Layout
from perl_megatron.verification.layout_run import run_layout
from perl_megatron.verification.reference import compute_reference

LAYOUTS = {"float32": Layout({}), "bfloat16": Layout({}, dtype="bfloat16")}
VISION_BIAS, OUTPUT = "visual.blocks.1.attn.qkv.bias", "lm_head.weight"
STEP, NEXT_STEP = "optimizer step", "optimizer step after reshard"
NEXT_GRADIENTS = "gradients after reshard"
EXPORTED, CHECKPOINT = "reshard, export → elsewhere", "reshard, checkpoint → elsewhere"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(findings, the judge's other arguments) of the tiny policy in this process, in float32."""
    return find("float32", tmp_path_factory)


@pytest.fixture(scope="module")
def found_bfloat16(tmp_path_factory):
    return find("bfloat16", tmp_path_factory)


def find(dtype, tmp_path_factory):
    layout = LAYOUTS[dtype]
    with shared_folder() as folder:
        case = make_case(folder / "policy", layout)
        findings = run_layout(layout, layout, case.policy, case.sequences, case.images, folder / "scratch")
        optimizer = layout.config(case.policy).optimizer
        after = compute_reference(
            findings.export, case.sequences, case.images, getattr(torch, dtype), optimizer.clip_gradient
        )
        kept = tmp_path_factory.mktemp("kept") / "policy"
        shutil.copytree(case.policy, kept)
    topology.shutdown()
    return findings, ((case.reference, after), open_checkpoint(kept), optimizer)


def rows_of(findings, others, dtype=torch.float32):
    return judge(findings, *others, dtype=dtype, other="elsewhere")


def failed_rows(findings, others, dtype=torch.float32):
    return {row.check: row.worst.name for row in rows_of(findings, others, dtype) if not row.passed}


def spoil(tensors, name, change):
    return tensors | {name: change(tensors[name].clone())}


def one_number(difference):
    def change(tensor):
        tensor.view(-1)[0] += difference
        return tensor

    return change


def test_nothing_fails_as_it_is(found, found_bfloat16):
    assert failed_rows(*found) == {}
    assert failed_rows(*found_bfloat16, torch.bfloat16) == {}


def test_every_parameter_has_its_gradient_judged(found):
    findings, others = found
    rows = rows_of(findings, others)
    names = [item.name for row in rows if row.check.startswith("gradients, ") for item in row.items]
    assert sorted(names) == sorted(findings.imported)
    assert sum(name.startswith("visual.") for name in names) == 42


@pytest.mark.parametrize("factor", [1 + 1e-4, 0.5, 2.0, -1.0, float("nan")])
def test_a_gradient_off_by_a_factor(found, factor):
    findings, others = found
    first, second = (spoil(each, VISION_BIAS, lambda tensor: tensor * factor) for each in findings.gradients)
    failed = failed_rows(replace(findings, gradients=(first, findings.gradients[1])), others)
    assert failed.pop("gradients, vision blocks") == VISION_BIAS
    assert failed.keys() <= {STEP, NEXT_STEP}  # which replay the gradients that they are given
    failed = failed_rows(replace(findings, gradients=(findings.gradients[0], second)), others)
    assert failed.pop(NEXT_GRADIENTS) == VISION_BIAS
    assert failed.keys() <= {NEXT_STEP}


def test_a_missing_gradient(found):
    findings, others = found
    gradients = {name: tensor for name, tensor in findings.gradients[0].items() if name != OUTPUT}
    failed = failed_rows(replace(findings, gradients=(gradients, findings.gradients[1])), others)
    assert failed["gradients, output layer"] == OUTPUT


@pytest.mark.parametrize("factor", [0.5, 1.5, 0.0])
def test_half_a_gradient_or_half_a_step_passes_in_no_precision(found_bfloat16, factor):
    """Each tensor by itself: the one with the widest tolerance decides."""
    findings, others = found_bfloat16
    source = others[1]
    gradients = tuple({name: tensor * factor for name, tensor in each.items()} for each in findings.gradients)
    rows = rows_of(replace(findings, gradients=gradients), others, torch.bfloat16)
    judged = [item for row in rows if row.check.startswith("gradients") for item in row.items]
    steps = {
        field: {name: source[name] + (weight - source[name]) * factor for name, weight in weights.items()}
        for field, weights in (("stepped", findings.stepped), ("continued", findings.continued))
    }
    rows = rows_of(replace(findings, **steps), others, torch.bfloat16)
    judged += [item for row in rows if row.check in (STEP, NEXT_STEP) for item in row.items]
    assert len(judged) == 4 * len(findings.imported)
    assert [item.name for item in judged if item.passed] == []
    assert max(item.tolerance for item in judged) <= CEILING


def test_two_log_probabilities_exchanged(found):
    findings, others = found
    log_probs = [*findings.log_probs]
    log_probs[2] = log_probs[2].flip(0)
    assert failed_rows(replace(findings, log_probs=log_probs), others) == {"log-probabilities": "sequence 2"}
    reimported = [*findings.reimported_log_probs]
    reimported[4] = reimported[4] + 1e-4
    assert failed_rows(replace(findings, reimported_log_probs=reimported), others) == {EXPORTED: "sequence 4"}


def test_a_gradient_norm_that_counts_a_part_twice(found):
    findings, others = found
    norm = findings.gradient_norm * (
        1 + 1e-4
    )  # the biases of a replicated tower, counted twice, add half as much again
    assert failed_rows(replace(findings, gradient_norm=norm), others) == {"gradient norm": "all parameters"}


def test_a_step_that_leaves_a_weight_out(found):
    findings, others = found
    stepped = spoil(findings.stepped, OUTPUT, lambda _: findings.imported[OUTPUT])
    restored = findings.restored | {OUTPUT: stepped[OUTPUT]}
    assert failed_rows(replace(findings, stepped=stepped, restored=restored), others) == {STEP: OUTPUT}


def test_a_step_without_the_moments_of_the_first(found):
    findings, others = found
    again = {
        name: weight + (weight - findings.imported[name]) if name == VISION_BIAS else findings.continued[name]
        for name, weight in findings.stepped.items()
    }
    assert failed_rows(replace(findings, continued=again), others) == {NEXT_STEP: VISION_BIAS}


def test_one_bit_of_an_export_or_a_checkpoint(found):
    findings, others = found
    imported = spoil(findings.imported, OUTPUT, one_number(1e-7))
    assert failed_rows(replace(findings, imported=imported), others) == {"export": OUTPUT}
    restored = spoil(findings.restored, VISION_BIAS, one_number(1e-7))
    assert failed_rows(replace(findings, restored=restored), others) == {CHECKPOINT: VISION_BIAS}
    stray = findings.imported | {"stray": torch.zeros(1)}
    assert failed_rows(replace(findings, imported=stray), others) == {"export": "stray"}


def test_tolerances_are_made_of_what_transformers_loses(found):
    findings, others = found
    (row,) = (row for row in rows_of(findings, others) if row.check == "gradients, output layer")
    reference, _ = others[0]
    exact, rounded = reference.exact.gradients[OUTPUT], reference.rounded.gradients[OUTPUT]
    yardstick = ((rounded - exact).norm() / exact.norm()).item()
    assert 0 < yardstick < 1e-5
    assert row.items[0].tolerance == pytest.approx(MULTIPLE * yardstick + torch.finfo(torch.float32).eps)


def test_the_command_says_that_a_wrong_weight_is_wrong(monkeypatch, tmp_path, capsys):
    original = stream.import_weights

    def import_with_a_slip(chunks, *arguments):
        original(chunks, *arguments)
        with torch.no_grad():
            chunks[0].vision_model.projection.encoder.linear_fc2.bias[0] += 0.01

    monkeypatch.setattr(stream, "import_weights", import_with_a_slip)
    assert main(["verify", "--tied", "--json", str(tmp_path / "rows.json")]) == 1
    content = json.loads((tmp_path / "rows.json").read_text())
    failed = {row["check"]: row["worst"]["name"] for row in content["rows"] if not row["passed"]}
    assert failed["export"] == "visual.merger.mlp.2.bias"
    assert {"log-probabilities", "gradients, vision blocks", "gradients, language layers"} <= failed.keys()
    assert "FAILED: log-probabilities" in capsys.readouterr().out
