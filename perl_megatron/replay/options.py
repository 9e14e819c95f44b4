"""The options of `perl-megatron replay`, and the start of its processes. Torch is imported in them only."""

from __future__ import annotations

import argparse
from pathlib import Path

from perl_megatron.config.layout import launched_processes
from perl_megatron.config.load import load_config
from perl_megatron.errors import UserError
from perl_megatron.launch import torchrun
from perl_megatron.launch.verdict import launch_for_verdict, verdict_status
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
        processes = launched_processes(config)
        return launch_for_verdict(argv, num_processes=processes, json_file=options.json, key="finite")
    from perl_megatron.runtime import environment, garbage

    environment.prepare_process()  # before torch is imported
    with garbage.paused():
        from perl_megatron.runtime import platform

        platform.install()  # before anything imports megatron-core or transformers
        from perl_megatron.replay import command

    return verdict_status(
        command.run(config, run, options.batch, checkpoint=options.checkpoint, json_file=options.json)
    )
