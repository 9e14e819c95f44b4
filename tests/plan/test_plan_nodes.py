"""The machines of a plan: their size by the config, and what stays within one."""

from dataclasses import replace
from pathlib import Path

import pytest
from derive_case import TINY, config_of

from perl_megatron.cli import main
from perl_megatron.config.derive import derive
from perl_megatron.config.derive_launch import check_slurm
from perl_megatron.plan.assumptions import Assumptions
from perl_megatron.plan.device_plan import Device, make_device_plan
from perl_megatron.plan.gpus import gpu_of
from perl_megatron.plan.node import Node, launch_for, node_of
from perl_megatron.plan.search import search

EXAMPLES = Path(__file__).parents[2] / "examples" / "qwen2_5_vl"
H100, CPU = gpu_of("h100-80g"), gpu_of("cpu")
SERVERS = ("rollout.engine=server", "rollout.servers=http://a:1", "rollout.tensor_parallel=4")


def plan_of(*settings, world_size, per_node):
    config = config_of(*settings)
    derived = derive(config, world_size=world_size, architecture=TINY, elsewhere=True)
    device = Device.of(H100, Assumptions(), processes=world_size, node=Node(per_node, "the test"))
    return make_device_plan(config, derived, TINY, device)


@pytest.mark.parametrize(
    ("settings", "processes", "gpu", "size", "source"),
    [
        ((), 64, H100, 8, "launch.gpus_per_node is not set"),
        ((), 16, CPU, 16, "this machine"),
        (("launch.nodes=16", "launch.gpus_per_node=4", "parallel.data=64"), 64, H100, 4, "launch.gpus_per_node"),
        (("launch.nodes=2", "parallel.data=12"), 12, H100, 6, "12 processes on launch.nodes = 2"),
        (("launch.nodes=2", "parallel.data=12"), 24, H100, 6, "12 processes on launch.nodes = 2"),  # a search
        (("launch.nodes=2",), 12, None, 6, "12 processes on launch.nodes = 2"),
        (("launch.nodes=4", "launch.gpus_per_node=8"), 4, H100, 8, "launch.gpus_per_node"),
    ],
)
def test_the_config_says_how_large_a_machine_is(settings, processes, gpu, size, source):
    node = node_of(config_of(*settings), processes, gpu)
    assert node.size == size
    assert source in node.source


def test_without_a_device_and_a_launch_nothing_is_said():
    assert node_of(config_of(), 8, None) is None


@pytest.mark.parametrize(
    ("span", "processes", "per_node", "within"),
    [(4, 8, 8, True), (8, 64, 8, True), (8, 64, 4, False), (4, 12, 6, False), (3, 12, 6, True), (12, 12, 16, True)],
)
def test_groups_stay_in_a_node_that_they_divide(span, processes, per_node, within):
    assert replace(H100, per_node=per_node).within_node(span, processes) == within


def test_all_that_depends_on_the_machines_follows():
    layout = ("parallel.tensor=2", "parallel.sequence=true", "rollout.engine=vllm")
    wide, narrow = (plan_of(*layout, world_size=4, per_node=size) for size in (4, 1))
    near = [{row.name: row.within_node for row in plan.time.traffic} for plan in (wide, narrow)]
    assert near == [dict.fromkeys(("tensor", "pipeline", "context", "data", "weight sync"), here) for here in (1, 0)]
    assert narrow.time.update > wide.time.update
    names = [{remark.name for remark in plan.remarks} for plan in (wide, narrow)]
    assert names[1] - names[0] == {"tensor group leaves its node", "engine leaves its node"}
    assert wide.as_json()["device"]["per_node"] == 4
    assert wide.as_json()["device"]["per_node_source"] == "the test"


@pytest.mark.parametrize(("per_node", "leaves"), [(4, False), (6, False), (2, True)])
def test_servers_are_on_machines_of_their_own(per_node, leaves):
    plan = plan_of(*SERVERS, world_size=1, per_node=per_node)
    assert ("engine leaves its node" in {remark.name for remark in plan.remarks}) == leaves
    (sync,) = [row for row in plan.time.traffic if row.name == "weight sync"]
    assert not sync.within_node


def test_processes_of_a_machine_share_its_memory():
    alone, four = (Device.of(CPU, Assumptions(), processes=8, node=Node(size, "the test")).memory for size in (1, 4))
    assert alone == 4 * four


def command(way, *settings, size="32b"):
    options = ["--gpu", "h100-80g"] if way == "plan" else ["--dry-run"]
    words = ["plan"] if way == "plan" else ["launch", "slurm"]
    return main([*words, str(EXAMPLES / f"{size}.yaml"), f"model.path={EXAMPLES / size}", *settings, *options])


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        (("launch.nodes=3",), "set launch.nodes=4, or"),
        (("launch.nodes=2",), "set launch.nodes=4, or"),
        (("parallel.data=4",), "set launch.nodes=8, or"),
        (("parallel.data=3", "launch.gpus_per_node=7", "launch.nodes=6"), "set launch.nodes=8 launch.gpus_per_node=6"),
        (("launch.gpus_per_node=0", "launch.nodes=3"), "make launch.nodes a divisor of 32, or"),
        (("parallel.data=null",), "set parallel.data so that"),
    ],
)
def test_plan_refuses_the_machines_that_launch_refuses(capsys, settings, fix):
    said = []
    for way in ("plan", "launch"):
        assert command(way, *settings) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    assert f"fix:   {fix}" in said[0]


def test_another_number_of_processes_is_on_machines_of_the_same_size(capsys):
    assert command("plan", "parallel.data=null", "--gpus", "64") == 0
    assert "8, 8 processes on each (launch.gpus_per_node)" in capsys.readouterr().out
    assert command("plan", "parallel.data=null", "launch.gpus_per_node=0", "launch.nodes=3", "--gpus", "64") == 2
    assert "64 processes (data 4 × tensor 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "processes", "size", "nodes", "gpus"),
    [
        ((), 8, 8, 1, 0),
        ((), 64, 8, 8, 0),
        (("launch.nodes=4", "launch.gpus_per_node=8"), 64, 8, 8, 8),
        (("launch.nodes=4", "launch.gpus_per_node=8"), 4, 8, 1, 4),
        (("launch.nodes=4", "launch.gpus_per_node=8"), 12, 8, 2, 6),
    ],
)
def test_the_section_for_another_number(settings, processes, size, nodes, gpus):
    launch = launch_for(config_of(*settings).launch, processes, size)
    assert (launch.nodes, launch.gpus_per_node) == (nodes, gpus)


@pytest.mark.parametrize(
    ("settings", "processes", "overrides"),
    [
        (("launch.nodes=2", "launch.gpus_per_node=4", "parallel.data=8"), 16, {"launch.nodes=4"}),
        (("launch.nodes=2", "launch.gpus_per_node=4", "parallel.data=8"), 8, set()),
        (("launch.nodes=2", "parallel.data=8"), 16, {"launch.nodes=4"}),
        ((), 16, {"launch.nodes=2"}),
        ((), 8, set()),
        (("launch.gpus_per_node=4", "launch.rollout_nodes=2"), 2, {"launch.gpus_per_node=2"}),
    ],
)
def test_proposals_can_be_launched_as_they_are(settings, processes, overrides):
    config = config_of("rollout.engine=auto", *settings)
    node = node_of(config, processes, H100)
    device = Device.of(H100, Assumptions(), processes=processes, node=node)
    result = search(config, TINY, device, processes=processes, limit=100, elsewhere=True)
    assert len(result.proposals) > 1
    for proposal in result.proposals:
        launched = {setting for setting in proposal.overrides if setting.startswith("launch.")}
        assert launched == overrides
        assert not [one for one in proposal.overrides if one.startswith(("rollout.engine", "rollout.servers"))]
        check_slurm(config_of("rollout.engine=auto", *settings, *proposal.overrides), "train")
