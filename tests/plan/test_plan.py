import inspect
import json
import subprocess
import sys

import pytest
from derive_case import TINY
from megatron.core import parallel_state

from perl_megatron.batching.cost import CostModel
from perl_megatron.batching.micro_batches import plan_micro_batches
from perl_megatron.batching.work import ViewWork
from perl_megatron.config.derive import derive
from perl_megatron.config.load import load_config
from perl_megatron.plan.summary import make_plan, render_plan


def derived_of(*overrides, world_size):
    config = load_config(None, ["model.path=m", "rollout.engine=embedded", *overrides]).config
    return config, derive(config, world_size=world_size, architecture=TINY), TINY


@pytest.fixture
def plan():
    return make_plan(*derived_of("parallel.tensor=2", "parallel.pipeline=2", world_size=8))


def test_every_rank_has_its_own_place(plan):
    places = [(rank["pipeline"], rank["data"], rank["tensor"]) for rank in plan["ranks"]]
    assert places == [(pipeline, data, tensor) for pipeline in (0, 1) for data in (0, 1) for tensor in (0, 1)]
    assert [rank["layers"] for rank in plan["ranks"]] == [[0, 1]] * 4 + [[2, 3]] * 4
    assert [rank["vision"] for rank in plan["ranks"]] == [True] * 4 + [False] * 4
    assert [rank["logits"] for rank in plan["ranks"]] == [False] * 4 + [True] * 4
    assert [rank["engine_replica"] for rank in plan["ranks"]] == list(range(8))


def test_plan_is_json_and_text(plan):
    assert json.loads(json.dumps(plan))["ranks"] == plan["ranks"]
    text = render_plan(plan)
    for part in (
        "2 views × 6 rollouts = 12 responses a question",
        "128 questions × 12 = 1536 responses",
        "8 = tensor 2 × pipeline 2 × context 1 × data 2",
        "(2, 2), in 1 model chunk(s)",
        "embedded, replicas: 8, processes in each: 1",
        "vision tower",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize(("vision", "said"), [("sharded", "sharded over tensor-parallel"), ("replicated", "its share")])
def test_where_the_vision_tower_is(vision, said):
    plan = make_plan(*derived_of("parallel.tensor=2", f"parallel.vision={vision}", world_size=2))
    assert plan["layout"]["vision"] == vision
    assert said in render_plan(plan)


def test_servers_are_asked_by_every_rank():
    servers = ("rollout.engine=server", "rollout.servers=http://a:8000,http://b:8000", "rollout.weight_transfer=disk")
    plan = make_plan(*derived_of(*servers, "rollout.shared_folder=w", "parallel.tensor=2", world_size=4))
    assert [rank["engine_replica"] for rank in plan["ranks"]] == [None] * 4
    text = render_plan(plan)
    assert "server, replicas: 2" in text
    assert "processes in each" not in text
    assert " any " in text


def test_places_are_those_of_megatron_core():
    order = inspect.signature(parallel_state.initialize_model_parallel).parameters["order"].default
    theirs = parallel_state.RankGenerator(tp=2, ep=1, dp=2, pp=2, cp=2, order=order)
    overrides = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2", "actor.sharing=vision"]
    ours = make_plan(*derived_of(*overrides, world_size=16))["ranks"]
    for axis, name in (("tp", "tensor"), ("cp", "context"), ("dp", "data"), ("pp", "pipeline")):
        groups = theirs.get_ranks(axis)
        for rank in ours:
            assert next(group.index(rank["rank"]) for group in groups if rank["rank"] in group) == rank[name]


def test_chunks_of_a_stage_take_turns():
    interleaved = ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]
    plan = make_plan(*derived_of(*interleaved, world_size=2))
    assert [rank["layers"] for rank in plan["ranks"]] == [[0, 2], [1, 3]]
    assert "0-0, 2-2" in render_plan(plan)
    plan = make_plan(*derived_of("parallel.pipeline=2", "parallel.first_stage_layers=1", world_size=2))
    assert [rank["layers"] for rank in plan["ranks"]] == [[0], [1, 2, 3]]


def test_a_login_node_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import perl_megatron.config.load, perl_megatron.config.derive, perl_megatron.config.architecture\n"
        "import perl_megatron.plan.summary, perl_megatron.launch.torchrun, perl_megatron.observability.run_folder\n"
        "import perl_megatron.cli"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_settings_are_shown_with_their_origins():
    loaded = load_config(None, ["preset=gspo", "model.path=m", "data.train=a.jsonl", "rollout.engine=embedded"])
    derived = derive(loaded.config, world_size=1, architecture=TINY)
    plan = json.loads(json.dumps(make_plan(loaded.config, derived, TINY, origins=loaded.origins)))
    assert plan["settings"]["algorithm.clip_low"] == {"value": 0.0003, "origin": "preset gspo"}
    assert plan["settings"]["data.train"] == {"value": ["a.jsonl"], "origin": "command line"}
    assert "run.seed" not in plan["settings"]
    text = render_plan(plan)
    row = next(line for line in text.splitlines() if "algorithm.clip_low" in line)
    assert "0.0003" in row
    assert "preset gspo" in row
    assert max(map(len, text.splitlines())) <= 110


def test_without_origins_no_settings_are_shown(plan):
    assert plan["settings"] == {}
    assert "Settings" not in render_plan(plan)


@pytest.mark.parametrize(("loss_view", "responses"), [("own", 6), ("original", 12)])
def test_the_most_micro_batches_bound_a_real_plan(loss_view, responses):
    """Conditioned on the original, a group's views have one prompt, and are one view of twice as many responses."""
    config, derived, numbers = derived_of(
        *("data.max_prompt_tokens=10", "rollout.max_response_tokens=50", "rollout.questions_per_step=6"),
        *("actor.micro_batch_tokens=915", f"algorithm.loss_view={loss_view}"),
        world_size=1,
    )
    most = make_plan(config, derived, numbers)["batch"]["most_micro_batches"]
    views = [
        ViewWork(tuple(range(start, start + responses)), 10, (50,) * responses, ((f"image {start}", 40),))
        for start in range(0, 72, responses)
    ]
    plan = plan_micro_batches(views, CostModel(numbers), token_budget=915, data_size=1)
    assert 1 < len(plan[0]) <= most <= 3 * len(plan[0])
