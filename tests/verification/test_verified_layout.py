import json
from pathlib import Path

import pytest

from perl_megatron.batching.cost import CostModel
from perl_megatron.batching.micro_batches import plan_micro_batches
from perl_megatron.batching.work import views_of
from perl_megatron.cli import main
from perl_megatron.config.architecture import read_architecture_numbers
from perl_megatron.errors import UserError
from perl_megatron.launch import torchrun
from perl_megatron.verification.layout import MICRO_BATCH_TOKENS, NUM_LAYERS, TEXT, VISION, Layout, policy_config
from perl_megatron.verification.tiny import tiny_sequences


def test_widths_differ_pairwise():
    queries = TEXT["hidden_size"] // TEXT["num_attention_heads"]
    widths = [
        TEXT["vocab_size"],
        TEXT["hidden_size"],
        TEXT["num_key_value_heads"] * queries,
        TEXT["intermediate_size"],
        queries,
        VISION["hidden_size"],
        VISION["intermediate_size"],
        VISION["hidden_size"] // VISION["num_heads"],
        4 * VISION["hidden_size"],
    ]
    assert len(set(widths)) == len(widths)
    heads = [TEXT["num_attention_heads"], TEXT["num_key_value_heads"], VISION["num_heads"]]
    assert len(set(heads)) == len(heads)


@pytest.mark.parametrize("sizes", [{"tensor": 4}, {"pipeline": 2, "virtual_pipeline": 2}, {"pipeline": 2, "tensor": 2}])
def test_every_size_of_the_matrix_fits_the_tiny_policy(sizes):
    layout = Layout.of(sizes)
    layout.check(sizes.get("tensor", 1) * sizes.get("pipeline", 1))


def test_sizes_of_one_are_left_out():
    assert Layout.of({"tensor": 1, "data": 1, "context": 1, "sequence": False}) == Layout({})
    assert Layout.of({"tensor": 2, "sequence": True}).parallel == {"tensor": 2, "sequence": True}
    assert Layout.of({"tensor": 2, "vision": "sharded"}).parallel == {"tensor": 2}
    assert str(Layout.of({"tensor": 2, "vision": "replicated"})).startswith("tensor 2 × vision replicated, ")


@pytest.mark.parametrize(
    ("sizes", "processes", "expected"),
    [
        ({"tensor": 2, "pipeline": 2}, 4, {"data": 4}),
        ({"data": 4}, 4, {"tensor": 4}),
        ({}, 1, {}),
        ({"data": 3}, 3, {"data": 3}),  # neither heads nor layers divide by 3
    ],
)
def test_the_layout_to_reshard_to(sizes, processes, expected):
    other = Layout.of(sizes, tied=True, dtype="bfloat16").other(processes)
    assert other == Layout(expected, tied=True, dtype="bfloat16")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sp"], "parallel.sequence"),
        (["--tp", "3"], "parallel.tensor"),
        (["--pp", "3"], "parallel.pipeline"),
        (["--vpp", "2"], "parallel.virtual_pipeline"),
        (["--pp", "2", "--vpp", "2", "--first-stage-layers", "1"], "parallel.virtual_pipeline"),
        (["--first-stage-layers", "1"], "parallel.first_stage_layers"),
        (["--layers", "5", "--pp", "2"], "parallel.pipeline"),
        (["--json", "nowhere/rows.json"], "nowhere"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(monkeypatch, capsys, options, said):
    monkeypatch.setattr(torchrun, "launch", lambda *_, **__: pytest.fail("started"))
    assert main(["verify", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "-2", "two"])
def test_a_size_is_a_whole_number_from_1(size):
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--tp", size])
    assert ended.value.code == 2


@pytest.mark.parametrize(("passed", "launched", "status"), [(True, 0, 0), (False, 0, 1), (True, 130, 130)])
def test_the_verdict_of_the_processes_is_the_status(monkeypatch, tmp_path, passed, launched, status):
    def launch(argv, *, num_processes):
        assert num_processes == 4
        file = Path(argv[argv.index("--json") + 1])
        file.write_text(json.dumps({"passed": passed}))
        return launched

    monkeypatch.setattr(torchrun, "launch", launch)
    assert main(["verify", "--tp", "2", "--dp", "2"]) == status
    assert main(["verify", "--tp", "2", "--dp", "2", "--json", str(tmp_path / "rows.json")]) == status
    assert json.loads((tmp_path / "rows.json").read_text()) == {"passed": passed}


def test_a_layout_is_checked_against_the_processes_that_there_are():
    with pytest.raises(UserError, match="4"):
        Layout.of({"tensor": 4}).check(2)


def test_the_batch_has_every_kind_of_micro_batch(tmp_path):
    """Responses that share a prompt, views that share images, parts (and of four replicas a rank) without images."""
    (tmp_path / "config.json").write_text(json.dumps(policy_config(False, NUM_LAYERS)))
    cost = CostModel(read_architecture_numbers(tmp_path))
    sequences = tiny_sequences()
    views = views_of([one.prompt for one in sequences], [len(one.response) for one in sequences])
    for data_size in (1, 2, 4):
        plan = plan_micro_batches(views, cost, token_budget=MICRO_BATCH_TOKENS, data_size=data_size)
        parts = [set(part) for rank in plan for part in rank]
        assert any({0, 8} <= part for part in parts), "two responses to the first prompt"
        assert any({0, 1} <= part for part in parts), "the same images in another order"
        assert not all(any(sequences[index].prompt.image_keys for index in part) for part in parts)
    assert not all(any(sequences[index].prompt.image_keys for part in rank for index in part) for rank in plan)
