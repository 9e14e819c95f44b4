from pathlib import Path

import pytest

from perl_megatron.config.derive_launch import (
    check_array,
    check_node_rank,
    check_slurm,
    endpoint_of,
    processes_per_node,
    servers_per_node,
    signal_seconds,
    with_servers,
)
from perl_megatron.config.load import load_config
from perl_megatron.config.schema import Config
from perl_megatron.config.sweep_sections import ArraySection
from perl_megatron.errors import UserError

EIGHT = ("parallel.tensor=4", "parallel.data=4", "launch.nodes=2", "launch.gpus_per_node=8")


def config(*overrides: str) -> Config:
    return load_config(None, ["model.path=m", *overrides]).config


def test_processes_are_spread_evenly():
    assert processes_per_node(config()) == 1
    assert processes_per_node(config(*EIGHT)) == 8
    assert processes_per_node(config("parallel.tensor=2")) == 2
    with pytest.raises(UserError, match=r"6 processes .* do not go evenly on 4 machines"):
        processes_per_node(config("parallel.tensor=2", "parallel.data=3", "launch.nodes=4"))
    with pytest.raises(UserError, match="how many processes there are on 2 machines"):
        processes_per_node(config("parallel.tensor=2", "launch.nodes=2"))


def test_the_place_to_meet():
    assert endpoint_of(config("launch.endpoint=node-1.cluster:29500").launch) == ("node-1.cluster", 29500)
    assert endpoint_of(config("launch.endpoint=[fe80::1]:29500").launch) == ("fe80::1", 29500)
    with pytest.raises(UserError, match="no place is set to meet at"):
        endpoint_of(config().launch)
    for wrong in ("host", "host:", ":1", "host:0", "host:70000", "host:port", "a b:1", "$(x):1"):
        with pytest.raises(UserError, match="is not the place of a machine"):
            endpoint_of(config(f"launch.endpoint={wrong}").launch)


def test_ranks_of_machines():
    static, c10d = config(*EIGHT).launch, config(*EIGHT, "launch.rendezvous=c10d").launch
    check_node_rank(static, 1)
    check_node_rank(c10d, None)
    for rank, said in ((None, "no rank"), (2, "2 is not the rank"), (-1, "-1 is not the rank")):
        with pytest.raises(UserError, match=f"{said} of one of 2 machines"):
            check_node_rank(static, rank)
    with pytest.raises(UserError, match="c10d gives out the ranks itself"):
        check_node_rank(c10d, 0)


def test_good_slurm_jobs(tmp_path: Path):
    setup = tmp_path / "setup.sh"
    setup.touch()
    check_slurm(config(*EIGHT), "train")
    check_slurm(
        config(
            *(*EIGHT, "launch.partition=gpu,big", "launch.account=lab_1", "launch.qos=high", "launch.time=2-12:30"),
            *("launch.sbatch_options=[--constraint=h100&ib, --exclusive, --mem=0]", f"launch.setup_file={setup}"),
            *("launch.container=pyxis", "launch.container_image=nvcr.io#nvidia/pytorch:25.01"),
            *("launch.container_mounts=[/data:/data, /scratch]", "launch.environment=[NCCL_DEBUG=INFO, EMPTY=]"),
            *("launch.rollout_nodes=2", "rollout.tensor_parallel=4"),
        ),
        "train",
    )
    check_slurm(config(*EIGHT), "sft")


@pytest.mark.parametrize(
    ("overrides", "said", "where"),
    [
        (("launch.gpus_per_node=4",), "2 × 4 GPUs are not the 16 processes of the layout", "launch.gpus_per_node = 4"),
        (("launch.partition=gpu\n#SBATCH --uid=0",), "is no name of Slurm's", "launch.partition"),
        (("launch.account=$(x)",), "is no name of Slurm's", "launch.account"),
        (("launch.qos=a b",), "is no name of Slurm's", "launch.qos"),
        (("launch.sbatch_options=[exclusive]",), "is no option of sbatch", "launch.sbatch_options"),
        (('launch.sbatch_options=["--comment=a b"]',), "is no option of sbatch", "launch.sbatch_options"),
        (('launch.sbatch_options=["--mem=1\\n#SBATCH --x"]',), "is no option of sbatch", "launch.sbatch_options"),
        (("launch.sbatch_options=--nodes=3",), "--nodes is left to `launch slurm`", "launch.sbatch_options"),
        (("launch.sbatch_options=--wait",), "--wait is left to `launch slurm`", "launch.sbatch_options"),
        (("launch.sbatch_options=--arr=0-9",), "--arr, which may stand for --array, is left", "launch.sbatch_options"),
        (("run.directory=a%b",), "Slurm cannot write logs below 'a%b'", "run.directory"),
        (('run.directory=a"b',), "Slurm cannot write logs", "run.directory"),
        (("launch.time=soon",), "'soon' is no time limit", "launch.time"),
        (("launch.time=2:30",), "a job of 150 s would be told to end as it begins, 150 s before", "launch.time = 2:30"),
        (("launch.time=1:0:0", "launch.grace_seconds=3600"), "a job of 3600 s", "launch.grace_seconds = 3600"),
        (("launch.time=0-1", "launch.grace_seconds=3600"), "a job of 3600 s", "launch.time = 0-1"),
        (("launch.environment=[1A=2]",), "'1A=2' does not set a variable", "launch.environment"),
        (("launch.environment=[A]",), "'A' does not set a variable", "launch.environment"),
        (('launch.environment=["A;x=2"]',), "does not set a variable", "launch.environment"),
        (("launch.environment=[UID=5]",), "does not set a variable", "launch.environment"),
        (("launch.setup_file=nowhere.sh",), "the file does not exist", "launch.setup_file = nowhere.sh"),
        (("launch.container=pyxis",), "there is no image to run", "launch.container = pyxis"),
        (("launch.container_image=x.sif",), "an image needs something that runs it", "launch.container = none"),
        (("launch.container=apptainer", "launch.container_image=-x.sif"), "be taken for an option", "container_image"),
        (("launch.container_mounts=[/data]",), "there is no container to mount it in", "launch.container_mounts"),
        (
            ("launch.container=apptainer", "launch.container_image=x.sif", "launch.container_mounts=[data]"),
            "'data' cannot be mounted",
            "launch.container_mounts",
        ),
        (("launch.rollout_nodes=1", "rollout.engine=vllm"), "have the servers of the run", "rollout.engine = vllm"),
        (("launch.rollout_nodes=1", "rollout.servers=http://a:1"), "have the servers of the run", "rollout.servers"),
        (("launch.rollout_nodes=1", "rollout.tensor_parallel=3"), "servers over 3 GPUs", "rollout.tensor_parallel = 3"),
    ],
)
def test_what_is_refused_before_anything_is_submitted(overrides: tuple[str, ...], said: str, where: str):
    with pytest.raises(UserError) as error:
        check_slurm(config(*EIGHT, *overrides), "train")
    assert said in error.value.what
    assert where in (error.value.where or "")
    assert error.value.fix


PLACES = {"slurm.options": "a.yaml:1", "slurm.setup": "a.yaml:2", "sweep.directory": "a.yaml:3"}


def test_good_job_arrays_of_a_sweep(tmp_path: Path):
    setup = tmp_path / "setup.sh"
    setup.touch()
    options = ("--partition=gpu", "--gpus-per-node=8", "--gpus=8", "--time=12:00:00", "--account=lab", "--exclusive")
    check_array(ArraySection(options=options, setup=setup), tmp_path, PLACES)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--comment=x --array=0-99", "is no option of sbatch"),
        ("--partition=gpu\nrm -rf /", "is no option of sbatch"),
        ("-p gpu", "is no option of sbatch"),
        *((f"{name}=3", f"{name} is left to") for name in ("--array", "--nodes", "--ntasks", "--ntasks-per-socket")),
        *((f"{name}=/x", f"{name} is left to") for name in ("--output", "--error", "--chdir")),
        *((name, f"{name} is left to") for name in ("--no-requeue", "--wait", "--test-only")),
        ("--signal=USR1@5", "--signal is left to"),
        # Slurm takes what is left of a name if only one option begins so.
        ("--arr=0-99", "--arr, which may stand for --array, is left to"),
        ("--sig=USR1@5", "--sig, which may stand for --signal, is left to"),
        ("--no-req", "--no-req, which may stand for --no-requeue, is left to"),
    ],
)
def test_options_that_would_change_the_job_array_of_a_sweep(option: str, said: str, tmp_path: Path):
    """They would come after its own, and win."""
    with pytest.raises(UserError) as error:
        check_array(ArraySection(options=("--exclusive", option)), tmp_path, PLACES)
    assert said in error.value.what
    assert error.value.where == "a.yaml:1: slurm.options"
    assert error.value.fix


def test_files_of_a_sweeps_job_array(tmp_path: Path):
    with pytest.raises(UserError, match="the file does not exist") as error:
        check_array(ArraySection(setup=Path("nofile.sh")), tmp_path, PLACES)
    assert error.value.where == "a.yaml:2: slurm.setup = nofile.sh"
    with pytest.raises(UserError, match="Slurm cannot write logs below") as error:
        check_array(ArraySection(), tmp_path / "a%j", PLACES)
    assert error.value.where == "a.yaml:3: sweep.directory"


@pytest.mark.parametrize(("command", "settings"), [("sft", ()), ("eval", ("evaluation.ask=endpoint",))])
def test_no_machines_for_servers_that_nobody_asks(command: str, settings: tuple[str, ...]):
    with pytest.raises(UserError, match="nobody would ask the servers") as error:
        check_slurm(config(*EIGHT, "launch.rollout_nodes=1", *settings), command)
    assert f"--job {command}" in error.value.where


def test_a_container_needs_a_folder_that_can_be_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a:b").mkdir()
    monkeypatch.chdir(tmp_path / "a:b")
    with pytest.raises(UserError, match="a:b, where the job runs, cannot be mounted"):
        check_slurm(config(*EIGHT, "launch.container=pyxis", "launch.container_image=x.sqsh"), "train")


def test_times():
    assert signal_seconds(config("launch.grace_seconds=0.5").launch) == 31
    for time in ("3", "2:31", "0:2:31", "0-0:3", "0-1", "1-0:0:0"):
        check_slurm(config(f"launch.time={time}"), "train")


def test_servers_use_up_the_gpus():
    assert servers_per_node(config()) == 1
    assert servers_per_node(config("launch.gpus_per_node=8")) == 8
    assert servers_per_node(config("launch.gpus_per_node=8", "rollout.tensor_parallel=4")) == 2


def test_the_servers_of_a_job_are_counted_by_their_gpus():
    job = config(*EIGHT, "launch.rollout_nodes=3", "rollout.tensor_parallel=4", "launch.server_port=9000")
    rollout = with_servers(job).rollout
    assert rollout.engine == "server"
    assert len(rollout.servers) == len(set(rollout.servers)) == 6
    assert {address.rpartition(":")[2] for address in rollout.servers} == {"9000", "9001"}
    without = config(*EIGHT)
    assert with_servers(without) is without
    for wrong in ("rollout.servers=http://a:1", "rollout.engine=vllm", "rollout.tensor_parallel=3"):
        with pytest.raises(UserError):
            with_servers(config(*EIGHT, "launch.rollout_nodes=3", wrong))
