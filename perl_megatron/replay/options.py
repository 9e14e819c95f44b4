"""The options of `perl-megatron replay`, and the start of its processes. Torch is imported in them only."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from perl_megatron.config.layout import launched_processes
from perl_megatron.config.load import load_config
from perl_megatron.errors import UserError
from perl_megatron.launch import torchrun
from perl_megatron.observability.run_folder import RunFolder


def add_replay(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    description = (
        "computes the batch of a skipped update again, and says which sequences and tensors give numbers that are not "
        "finite; status 1 where there are any"
    )
    replay = commands.add_parser("replay", help=description, description=description)
    replay.set_defaults(handler=run_replay, preset=[])
    replay.add_argument("batch", type=Path, metavar="RUN/skipped/step-N", help="the folder of the batch")
    text = "settings other than the run's, such as another layout"
    replay.add_argument("overrides", nargs="*", metavar="section.key=value", help=text)
    text = "training checkpoint or Hugging Face folder (default: the run's newest one from before the batch)"
    replay.add_argument("--checkpoint", type=Path, metavar="FOLDER", help=text)
    replay.add_argument("--json", type=Path, metavar="FILE", help="write all findings")


def run_replay(options: argparse.Namespace, argv: list[str]) -> int:
    """Start the processes of the run's layout, or be one of them; returns the exit status."""
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError("the folder does not exist", where=f"--json {options.json}", fix="create it first")
    run = RunFolder(options.batch.resolve().parent.parent)
    if not run.config.is_file():
        fix = "give the batch in its place, RUN/skipped/step-N: the run's config.yaml is needed"
        raise UserError("the batch belongs to no run", where=str(options.batch), fix=fix)
    config = load_config(run.config, options.overrides).config
    if torchrun.needs_launch(config):
        return _launch(options, argv, launched_processes(config))
    from perl_megatron.runtime import environment, garbage

    environment.prepare_process()  # before torch is imported
    with garbage.paused():
        from perl_megatron.runtime import platform

        platform.install()  # before anything imports megatron-core or transformers
        from perl_megatron.replay import command

    finite = command.run(config, run, options.batch, checkpoint=options.checkpoint, json_file=options.json)
    # torchrun would take a verdict for a crash: a process that was launched here ends with 0.
    return 0 if finite or torchrun.launcher_pid() is not None else 1


def _launch(options: argparse.Namespace, argv: list[str], processes: int) -> int:
    """Start the processes; their verdict comes back in the file that they write."""
    with tempfile.TemporaryDirectory(prefix="perl-megatron-replay-") as folder:
        file = options.json or Path(folder) / "findings.json"
        status = torchrun.launch([*argv, "--json", str(file)], num_processes=processes)
        if status != 0:
            return status
        return 0 if json.loads(file.read_text(encoding="utf-8"))["finite"] else 1
