"""A real Slurm of its own on this machine: its daemons on free ports, all files in one folder, gone at the end."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from perl_megatron.launch.ports import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
READY_SECONDS = 60
END_SECONDS = 30
MAX_FIRST_JOB = 1_000_000

CONFIG = """
ClusterName=perl
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
FirstJobId={first_job}
SchedulerParameters=sched_interval=1,batch_sched_delay=0

ReturnToService=2
MpiDefault=none
KillWait=5
MinJobAge=300
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""
PARTITIONS = """
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=60 State=UP PriorityTier=2
"""
"""A job of the second one that finds no free node preempts jobs of the first, which have a minute to end."""


def slurm_obstacle() -> str | None:
    """Why no Slurm can be started here; None where one can."""
    if os.geteuid() != 0:
        return "Slurm's daemons are started by root only"
    missing = [name for name in (*DAEMONS, "sbatch", "srun", "scontrol") if find(name) is None]
    return f"not installed: {', '.join(missing)} (sh tools/install_slurm.sh)" if missing else None


def find(name: str) -> str | None:
    """The program's path; daemons lie where users do not look."""
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin")))


def shares_of_cores(num_machines: int) -> list[set[int]]:
    """Cores of this machine for each that it is taken for: as many as each of so many ranks has on one machine."""
    cores = sorted(os.sched_getaffinity(0))
    size = max(1, len(cores) // num_machines)
    return [{cores[(number * size + index) % len(cores)] for index in range(size)} for number in range(num_machines)]


@dataclass(frozen=True)
class SlurmCluster:
    """A running one."""

    root: Path
    nodes: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        """What its commands need."""
        return {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf")}

    def call(self, *command: str) -> str:
        """The output of one of its commands."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.call("scontrol", "--oneliner", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def processes_of(self, number: int) -> list[psutil.Process]:
        """All that have the job's number in their environment, but for Slurm's own; other clusters have it too."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error, OSError):
                own = process.environ().get("SLURM_JOB_ID") == str(number)
                if own and not process.name().startswith("slurm"):
                    found.append(process)
        return found

    def processes(self) -> list[psutil.Process]:
        """Whatever has its configuration in the environment: daemons, Slurm's guards of job steps, and jobs."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"] and _is_running(process):
                    found.append(process)
        return found

    def wait(self, number: int, condition: Callable[[dict[str, str]], bool], seconds: float = 300) -> dict[str, str]:
        """The job once it is as it should be."""
        until = time.monotonic() + seconds
        while not condition(job := self.job(number)):
            assert time.monotonic() < until, job
            time.sleep(0.2)
        return job


@contextmanager
def running_cluster(root: Path, num_nodes: int) -> Iterator[SlurmCluster]:
    """Started, with all nodes idle; ended by the daemons' pid files, with all that they left."""
    cluster = SlurmCluster(root, tuple(f"perl{number}" for number in range(num_nodes)))
    try:
        _start(cluster)
        yield cluster
        _cancel_all(cluster)
    finally:
        _end(cluster)


def _start(cluster: SlurmCluster) -> None:
    root, host = cluster.root, socket.gethostname().split(".")[0]
    key = root / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    lines = [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs={len(cores)} State=UNKNOWN"
        for node, cores in zip(cluster.nodes, shares_of_cores(len(cluster.nodes)), strict=True)
    ]
    # Ports follow from a job's number, and clusters of several test processes are on this machine at the same time.
    first_job = 1 + secrets.randbelow(MAX_FIRST_JOB)
    config = CONFIG.format(host=host, root=root, controller_port=free_port(), first_job=first_job)
    (root / "slurm.conf").write_text("\n".join([config, *lines, PARTITIONS]))
    (root / "state").mkdir()
    for node in cluster.nodes:
        (root / f"spool-{node}").mkdir()
    # By force, as other users do not reach its socket below this folder, and need not.
    munged = ("--force", "--key-file", key, "--socket", root / "munge.socket", "--pid-file", root / "munged.pid")
    _daemon(cluster, "munged", *munged, "--log-file", root / "munged.log", "--seed-file", root / "munge.seed")
    _daemon(cluster, "slurmctld", "-f", root / "slurm.conf")
    for node, cores in zip(cluster.nodes, shares_of_cores(len(cluster.nodes)), strict=True):
        _daemon(cluster, "slurmd", "-f", root / "slurm.conf", "-N", node, cores=cores)
    until, idle = time.monotonic() + READY_SECONDS, ["idle"] * len(cluster.nodes)
    # Of one partition: each has a line for each of its nodes.
    asked = ("sinfo", "--Node", "--partition=all", "--noheader", "--format=%T")
    while (states := cluster.call(*asked).split()) != idle:
        assert time.monotonic() < until, f"{states}\n{_logs(root)}"
        time.sleep(0.2)


def _daemon(cluster: SlurmCluster, name: str, *arguments: object, cores: set[int] | None = None) -> None:
    command = [find(name) or name, *map(str, arguments)]
    result = subprocess.run(
        command,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=None if cores is None else partial(os.sched_setaffinity, 0, cores),
    )
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}\n{_logs(cluster.root)}"


def _logs(root: Path) -> str:
    return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in sorted(root.glob("*.log")))


def _cancel_all(cluster: SlurmCluster) -> None:
    """Until Slurm knows that nothing of any job is left."""
    cluster.call("scancel", "--user=root")
    until = time.monotonic() + END_SECONDS
    while cluster.call("squeue", "--noheader"):
        assert time.monotonic() < until, f"{cluster.call('squeue')}\n{_logs(cluster.root)}"
        time.sleep(0.2)


def _end(cluster: SlurmCluster) -> None:
    """By the daemons' pid files; munged last, which the others need to the end."""
    for pattern in ("slurmd-*.pid", "slurmctld.pid", "munged.pid"):
        daemons = _by_pid_file(cluster.root, pattern)
        for process in daemons:
            process.send_signal(signal.SIGTERM)
        until = time.monotonic() + END_SECONDS
        while any(map(_is_running, daemons)) and time.monotonic() < until:
            time.sleep(0.1)
    left = cluster.processes()
    for process in left:
        process.kill()
    assert not left, left


def _by_pid_file(root: Path, pattern: str) -> Sequence[psutil.Process]:
    pids = [int(file.read_text()) for file in root.glob(pattern) if file.read_text().strip()]
    return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]


def _is_running(process: psutil.Process) -> bool:
    """A daemon's parent may not be one that looks after it when it has ended."""
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
