"""Jobs in a real Slurm of two nodes on this machine; a stand-in notes how trainers and servers are called.

tests/end_to_end/test_slurm_run.py trains in such a job.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, running_cluster, slurm_obstacle

from perl_megatron.config.load import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
POLICY = REPOSITORY / "examples" / "qwen2_5_vl" / "7b"
HOSTILE = 'it\'s "all" $(touch hit) `touch hit` \n ; touch hit #'
"""Must arrive as it is, and be run nowhere."""

pytestmark = pytest.mark.skipif(slurm_obstacle() is not None, reason=str(slurm_obstacle()))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with running_cluster(tmp_path_factory.mktemp("slurm"), 2) as found:
        yield found


class Job:
    """A job of a folder with a hostile name."""

    def __init__(self, cluster: SlurmCluster, work: Path, *overrides: str, **environment: str):
        self.cluster = cluster
        self.work = work / "it's $(touch hit) & `touch hit`"
        self.notes, self.files = self.work / "notes", self.work / "a run's" / "job.slurm"
        self.notes.mkdir(parents=True)
        (self.work / "data.jsonl").write_text("")
        python = self.work / "python of the job"
        python.symlink_to(Path(__file__).with_name("stand_in_python.py"))
        self.config = {"run.directory": "a run's", "run.name": "job", "model.path": str(POLICY)}
        self.config |= {"data.train": f"[{json.dumps(str(self.work / 'data.jsonl'))}]", "launch.python": str(python)}
        self.config |= {"parallel.data": "1", "data.system_prompt": HOSTILE, "rollout.engine": "auto"}
        self.overrides = [*(f"{key}={value}" for key, value in self.config.items()), *overrides]
        self.environment = cluster.environment | {"NOTES": str(self.notes), "RUN": "a run's/job", **environment}

    def launch(self) -> int:
        """Submit it; the job's number."""
        return self.number_of(self.submit())

    def submit(self, *further: str) -> subprocess.CompletedProcess[str]:
        """`perl-megatron launch slurm` with further settings or options."""
        (self.work / "empty.yaml").write_text("")
        command = [sys.executable, "-m", "perl_megatron", "launch", "slurm", "empty.yaml", *self.overrides, *further]
        environment = self.environment | {"PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(command, cwd=self.work, env=environment, capture_output=True, text=True, timeout=120)

    def number_of(self, submitted: subprocess.CompletedProcess[str]) -> int:
        """The job's number, from what was printed."""
        assert submitted.returncode == 0, submitted.stderr
        assert list(self.work.rglob("hit")) == []
        return int(submitted.stdout.split()[1].rstrip(":"))

    @property
    def config_file(self) -> Path:
        """As it was submitted, once."""
        [file] = self.files.glob("config-*.yaml")
        return file

    def note(self, name: str) -> dict:
        """What the stand-in wrote, once it has."""
        self.until((self.notes / name).exists, name)
        return json.loads((self.notes / name).read_text())

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 90
        while not condition():
            assert time.monotonic() < deadline, f"{what}: {self.log()}"
            time.sleep(0.1)

    def log(self) -> str:
        return "\n".join(log.read_text() for log in self.files.glob("job-*.log"))


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def setting(arguments: list[str], key: str) -> str:
    """The last value that the arguments give it."""
    return [argument for argument in arguments if argument.startswith(f"{key}=")][-1].partition("=")[2]


def test_a_job_is_told_to_go_queued_again_and_resumed(cluster: SlurmCluster, tmp_path: Path) -> None:
    setup = tmp_path / "set up"
    setup.write_text('export SAID="$SAID and set up"\n')
    launch = ["launch.nodes=2", "parallel.data=2", f"launch.environment=[{json.dumps(f'SAID={HOSTILE}')}]"]
    job = Job(cluster, tmp_path, *launch, f"launch.setup_file={setup}", "launch.time=10", FOLDER="1")
    number = job.launch()
    first = job.note("launch-perl0-0.json")
    second = job.note("launch-perl1-0.json")
    assert (first["SLURM_NODEID"], second["SLURM_NODEID"]) == ("0", "1")
    assert first["SAID"] == f"{HOSTILE} and set up" == second["SAID"]
    arguments = first["arguments"]
    assert arguments == second["arguments"]
    assert arguments[:4] == ["launch", "torchrun", "--job", "train"]
    assert "--resume" not in arguments
    endpoint = setting(arguments, "launch.endpoint")
    assert endpoint == f"127.0.0.1:{20000 + number % 10000}"
    assert option(arguments, "--logs") == f"./a run's/job.slurm/job-{number}.0"
    submitted = load_config(job.config_file).config
    assert submitted.data.system_prompt == HOSTILE
    assert (submitted.launch.nodes, setting(arguments, "launch.nodes")) == (2, "2")
    cluster.call("scancel", "--batch", "--signal=USR1", str(number))
    assert job.note("launch-perl0-stopped.json") is True
    again = job.note("launch-perl1-1.json")
    assert again["arguments"][:5] == ["launch", "torchrun", "--job", "train", "--resume"]
    assert option(again["arguments"], "--logs") != option(arguments, "--logs")
    done = cluster.wait(number, lambda job: job["JobState"] == "COMPLETED")
    assert (done["Restarts"], done["ExitCode"]) == ("1", "0:0")
    assert "queued again, to resume" in job.log()
    assert list(job.files.glob("*.stop")) == []
    assert list(job.work.rglob("hit")) == []


def test_a_restart_before_there_is_a_run_folder_is_no_resume(cluster: SlurmCluster, tmp_path: Path) -> None:
    """With one the run is resumed, checkpoint or not; tests/end_to_end/test_slurm_run.py has one without."""
    job = Job(cluster, tmp_path)
    number = job.launch()
    job.note("launch-perl0-0.json")
    cluster.call("scancel", "--batch", "--signal=USR1", str(number))
    cluster.wait(number, lambda job: job["JobState"] == "COMPLETED")
    assert "--resume" not in job.note("launch-perl0-1.json")["arguments"]


def test_each_submission_has_its_own_config(cluster: SlurmCluster, tmp_path: Path) -> None:
    """And two jobs that wait would not train into one folder."""
    job = Job(cluster, tmp_path, "launch.sbatch_options=[--hold]")
    first = job.launch()
    [config] = job.files.glob("config-*.yaml")
    submitted = config.read_bytes()
    second = job.submit("data.system_prompt=other")
    assert second.returncode == 2
    assert f"job {first} (PENDING) of the same run is not over" in second.stderr
    behind = f"launch.sbatch_options=[--dependency=afterany:{first}]"
    assert behind in second.stderr
    assert list(job.files.glob("config-*.yaml")) == [config]
    third = job.number_of(job.submit("data.system_prompt=other", behind, "launch.requeue=false"))
    evaluation = job.number_of(job.submit("--job=eval", "data.evaluation=data.jsonl"))
    assert config.read_bytes() == submitted
    assert len(list(job.files.glob("config-*.yaml"))) == 3
    cluster.call("scontrol", "release", str(first))
    arguments = job.note("launch-perl0-0.json")["arguments"]
    assert f"./a run's/job.slurm/{config.name}" in arguments
    # The one behind it goes on with its run, if that has begun.
    (job.work / "a run's" / "job").mkdir()
    (job.work / "a run's" / "job" / "config.yaml").touch()
    (job.notes / "launch-perl0-0.json").unlink()
    cluster.call("scancel", str(first), str(evaluation))
    job.until(lambda: list(job.notes.glob("launch-*-0.json")) != [], "the job behind it")
    [note] = job.notes.glob("launch-*-0.json")
    assert "--resume" in json.loads(note.read_text())["arguments"]
    cluster.call("scancel", str(third))
    cluster.wait(third, lambda job: job["JobState"] == "CANCELLED")
    shutil.rmtree(job.work / "a run's" / "job")
    fourth = job.launch()
    assert [path.name for path in job.files.glob("job-*.sbatch")] == [f"job-{fourth}.sbatch"]
    assert len(list(job.files.glob("config-*.yaml"))) == 1
    assert not config.exists()


@pytest.mark.parametrize("by", ["user", "no requeue"])
def test_a_cancelled_job_ends_by_itself_and_is_not_queued_again(cluster: SlurmCluster, tmp_path: Path, by: str) -> None:
    job = Job(cluster, tmp_path, *(["launch.requeue=false"] if by == "no requeue" else []), FOLDER="1")
    number = job.launch()
    job.note("launch-perl0-0.json")
    signal = ["--batch", "--signal=USR1"] if by == "no requeue" else ["--batch", "--signal=TERM"]
    cluster.call("scancel", *signal, str(number))
    assert job.note("launch-perl0-stopped.json") is True
    done = cluster.wait(number, lambda job: job["JobState"] == "FAILED")
    assert (done["Restarts"], done["ExitCode"]) == ("0", "75:0")


def test_servers_run_beside_the_trainer_and_end_with_it(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "launch.rollout_nodes=1", "launch.server_port=18000", FOLDER="1")
    number = job.launch()
    server, trainer = job.note("serve-perl1-18000.json"), job.note("launch-perl0-0.json")
    assert option(server["arguments"], "--host") == "0.0.0.0"
    key = setting(server["arguments"], "rollout.api_key_file")
    assert setting(trainer["arguments"], "rollout.api_key_file") == key
    assert len((job.work / key).read_text().strip()) > 20
    assert (job.work / key).stat().st_mode & 0o777 == 0o600
    config = load_config(job.config_file, trainer["arguments"][trainer["arguments"].index("--stop-file") + 3 :])
    assert config.config.rollout.engine == "server"
    assert config.config.rollout.servers == ("http://127.0.0.1:18000",)
    cluster.call("scancel", "--batch", "--signal=TERM", str(number))
    cluster.wait(number, lambda job: job["JobState"] == "FAILED")
    assert job.note("serve-perl1-18000-ended.json") == 2


def test_servers_end_where_the_trainer_fails(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "launch.rollout_nodes=1", "launch.server_port=18000", FAIL="1")
    done = cluster.wait(job.launch(), lambda job: job["JobState"] == "FAILED")
    assert (done["Restarts"], done["ExitCode"]) == ("0", "1:0")
    assert job.note("serve-perl1-18000-ended.json") == 2


def test_what_slurm_refuses_is_told_and_leaves_nothing(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "launch.partition=nowhere")
    refused = job.submit()
    assert refused.returncode == 2
    assert "Slurm refused the job: sbatch: error: invalid partition specified: nowhere" in refused.stderr
    assert not job.files.exists()
