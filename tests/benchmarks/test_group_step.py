"""The group step's benchmark: its operations against counts by hand, what it refuses, and its tiny case end to end."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import scaled_dot_product_attention

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu_group_step import TINY  # noqa: E402
from group_step import MISSED_GOAL, agree, rows_of_operations  # noqa: E402
from group_step_cases import QUICK, make_encoder, make_group, write_case  # noqa: E402
from group_step_flops import BACKWARD_PRODUCTS, FORWARD_PRODUCTS, attention_product, count, minimum  # noqa: E402
from group_step_trl import missing_modules  # noqa: E402

CASE = QUICK["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("case")
    write_case(CASE, folder)
    return folder


def test_products_in_place_count_like_the_others():
    first, second, total = torch.ones(3, 4), torch.ones(4, 5), torch.zeros(3, 5)
    batches = torch.ones(2, 3, 4), torch.ones(2, 4, 5), torch.zeros(2, 3, 5)
    operations = 2 * 3 * 4 * 5
    assert count(lambda: first @ second) == operations
    assert count(lambda: total.addmm_(first, second)) == operations
    assert count(lambda: torch.mm(first, second, out=total)) == operations
    assert count(lambda: batches[2].baddbmm_(*batches[:2])) == 2 * operations


@pytest.mark.parametrize("causal", [False, True])
def test_attention_counts_the_pairs_that_are_seen(causal):
    """Grouped queries: keys are shared, products are not."""
    query, key = (torch.ones(2, heads, 5, 8, requires_grad=True) for heads in (4, 2))
    pairs = 5 * 6 // 2 if causal else 25
    product = 2 * 2 * 4 * pairs * 8
    assert attention_product(query.shape, key.shape, causal=causal) == product

    def attend():
        return scaled_dot_product_attention(query, key, key, is_causal=causal, enable_gqa=True)

    assert count(attend) == FORWARD_PRODUCTS * product
    assert count(lambda: attend().sum().backward()) == (FORWARD_PRODUCTS + BACKWARD_PRODUCTS) * product


def test_a_group_has_the_same_images_in_every_order(folder):
    group = make_group(CASE, folder, make_encoder(folder))
    prompts = list({id(sequence.prompt): sequence.prompt for sequence in group}.values())
    assert len(group) == CASE.views * CASE.rollouts
    assert len(prompts) == CASE.views
    assert prompts[0].image_keys != prompts[1].image_keys
    assert len(set(prompts[0].image_keys)) == CASE.images
    assert set(prompts[0].image_keys) == set(prompts[1].image_keys)
    assert len({len(sequence.response) for sequence in group}) > 1, "the tiny case is ragged"
    again = make_group(CASE, folder, make_encoder(folder))
    for one, other in zip(group, again, strict=True):
        np.testing.assert_array_equal(one.response, other.response)
        np.testing.assert_array_equal(one.logprob_old, other.logprob_old)


def test_the_least_counts_nothing_twice(folder):
    """A second response to a view costs that response; a view of the same images costs its prompt and responses."""
    group = make_group(CASE, folder, make_encoder(folder))
    policy = folder / "policy"
    first, second = group[: CASE.rollouts], group[CASE.rollouts :]
    images = sum(minimum(part, policy) for part in (first, second)) - minimum(group, policy)
    assert images > 0
    assert minimum([first[0], first[0]], policy) < 1.5 * minimum([first[0]], policy)


def test_no_rows_where_a_side_computes_something_else(tmp_path, capsys):
    first = {"full": {"loss": 1.0, "operations": 1}, "none": {"loss": 1.0, "operations": 2}}
    gradients = {"visual.a": torch.ones(3), "b": torch.ones(3)}
    save_file(gradients, tmp_path / "none.safetensors")
    save_file(gradients, tmp_path / "full.safetensors")
    agree("case", first, tmp_path)
    assert "vision 0.0e+00" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="'full' and 'none' do not compute the same"):
        agree("case", first | {"full": {"loss": 1.001, "operations": 1}}, tmp_path)
    # Of the whole gradient this is 1e-4 · √(1/2), of the vision tower's 1e-3.
    gradients = {"visual.a": torch.full((3,), 1e-1), "b": torch.full((3,), 1.0)}
    save_file(gradients, tmp_path / "none.safetensors")
    save_file(gradients | {"visual.a": torch.full((3,), 1e-1 + 5e-5)}, tmp_path / "full.safetensors")
    with pytest.raises(SystemExit, match="do not compute the same"):
        agree("case", first, tmp_path)


def test_the_share_of_the_saving_that_is_missed():
    rows = rows_of_operations("case", {"full": 3 * 10**12, "none": 12 * 10**12}, 2 * 10**12, time_left=0.5)
    values = {row.case.removeprefix("case: "): row for row in rows if row.peer != "the least"}
    beyond = values["operations beyond the least"]
    assert beyond.ratio == pytest.approx(1 / 10)
    assert beyond.goal == MISSED_GOAL
    assert values["operations"].ratio == pytest.approx(1 / 4)
    assert values["time left"].ratio == pytest.approx(0.5 / 0.25)


@pytest.mark.slow
def test_the_group_step_benchmark_compares_equal_work(tmp_path):
    """It ends with an error where losses or gradients differ; the times themselves depend on the machine."""
    command = [sys.executable, str(BENCHMARKS / "group_step.py"), "--quick", "--json", str(tmp_path / "rows.json")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    peers = {row["peer"] for row in rows if row["case"] == "tiny: forward + backward"}
    operations = {row["peer"]: row["peer_value"] for row in rows if row["case"] == "tiny: operations"}
    if missing_modules():
        assert "TRL's trainer is left out" in run.stdout
        assert peers == {"vision", "none"}
    else:
        assert peers == {"vision", "none", "TRL"}
        assert operations["TRL"] > operations["none"]
    (full,) = {row["ours"] for row in rows if row["case"] == "tiny: operations"}
    assert operations["the least"] < full < operations["vision"] < operations["none"]


@pytest.mark.slow
def test_the_gpu_benchmarks_own_sides_run_on_a_cpu_too(tmp_path):
    """One of its processes, on its tiny case; the times on a GPU are what it is for."""
    folder = tmp_path / "case"
    folder.mkdir()
    write_case(TINY["tiny"], folder, dtype=torch.bfloat16)
    command = [sys.executable, str(BENCHMARKS / "gpu_group_step.py"), "--worker", "full", "--case", "tiny"]
    run = subprocess.run(
        [*command, "--folder", str(folder), "--repeats", "1"], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["layers"] == "torch" if not torch.cuda.is_available() else found["memory_gib"] > 0
    assert abs(found["loss"]) < 1
