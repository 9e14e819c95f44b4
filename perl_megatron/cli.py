"""The command `perl-megatron`: train, sft, eval, launch, sweep, plan, replay and more.

A command that needs several processes starts them itself through torchrun; under torchrun it is one of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from perl_megatron import __version__
from perl_megatron.config.architecture import read_architecture_numbers
from perl_megatron.config.derive import derive, require_training_data
from perl_megatron.config.layout import launched_processes
from perl_megatron.config.load import LoadedConfig, load_config
from perl_megatron.config.preset_source import preset_names
from perl_megatron.errors import UserError
from perl_megatron.evaluation.results_options import add_results_options
from perl_megatron.launch.console import EXIT_UNREAD, flush_output, is_unread
from perl_megatron.launch.failures import EXIT_FAILURE, EXIT_USER_ERROR, record_failure
from perl_megatron.launching import add_launch
from perl_megatron.plan.command import add_plan_options, run_plan
from perl_megatron.replay.options import add_replay
from perl_megatron.runtime import garbage
from perl_megatron.sweep.options import add_sweep


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        try:
            return _run(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            flush_output()  # not as late as Python does it, where nothing can be done about a broken pipe
    except BrokenPipeError:
        if not is_unread():
            raise
        return EXIT_UNREAD


def _run(argv: list[str]) -> int:
    options = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("perl_megatron").setLevel(logging.INFO)
    try:
        return options.handler(options, argv)
    except UserError as error:
        if not record_failure(error):
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Exception as error:
        if not record_failure(error):
            raise
        return EXIT_FAILURE


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; settings (`section.key=value`) may stand anywhere, which argparse alone does not allow."""
    parser = make_parser()
    options, rest = parser.parse_known_args(argv)
    strange = [argument for argument in rest if argument.startswith("-") or "=" not in argument]
    if strange or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}")
    if "overrides" in options:
        options.overrides += [*(f"preset={name}" for name in options.preset), *rest]
    return options


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="perl-megatron", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, description, handler in (
        ("train", "permuted GRPO", run_job),
        ("sft", "supervised warm start on the records' demonstrations", run_job),
        ("eval", "held-out accuracy and order bias of model.path, or its results on benchmarks", run_job),
        ("serve", "a vLLM server of model.path, for runs with rollout.engine=server", run_serve),
        ("plan", "batch arithmetic, layout, memory and time of a step, without starting anything", run_plan),
    ):
        command = commands.add_parser(name, help=description, description=description)
        command.set_defaults(handler=handler)
        command.add_argument("config", type=Path, help="YAML file")
        command.add_argument(
            "overrides", nargs="*", metavar="section.key=value", help="settings that win over the file"
        )
        text = f"published settings, below the file's own; several: later ones win ({', '.join(preset_names())})"
        command.add_argument("--preset", action="append", default=[], metavar="NAME", help=text)
        if name in ("train", "sft"):
            command.add_argument("--resume", action="store_true", help="continue from the last good checkpoint")
        if name in ("train", "sft", "eval"):
            command.add_argument(
                "--master-port", type=int, help="rendezvous port of the processes (default: a free one)"
            )
        if name == "serve":
            command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
            command.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
            text = "images that a prompt may have (default: as many as the config's questions have)"
            command.add_argument("--max-images", type=positive, metavar="N", help=text)
            command.add_argument("--log-requests", action="store_true", help="print a line for every request")
            text = "end by SIGINT only: Slurm sends SIGTERM to servers whose trainer still needs them"
            command.add_argument("--ignore-sigterm", action="store_true", help=text)
        if name == "plan":
            add_plan_options(command)
    add_launch(commands, check_before_start)
    add_verify(commands)
    description = "compare the weights of two checkpoints of any format, tensor by tensor; status 1 where they differ"
    verify = commands.add_parser("verify-weights", help=description, description=description)
    verify.set_defaults(handler=run_verify_weights)
    for name in ("first", "second"):
        verify.add_argument(name, type=Path, help="Hugging Face folder, torch_dist folder or training checkpoint")
    verify.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="config.json of a checkpoint without config.json (default: the other's)",
    )
    verify.add_argument("--json", type=Path, metavar="FILE", help="write every row")
    add_triage(commands)
    add_sweep(commands, positive)
    add_replay(commands)
    description = "results of benchmarks in the form of PeRL's table, the paper's rows beside them"
    results = commands.add_parser("results", help=description, description=description)
    results.set_defaults(handler=run_results)
    add_results_options(results)
    doctor = commands.add_parser("doctor", help="versions, device, live fused paths, what to install")
    doctor.set_defaults(handler=run_doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return parser


def add_verify(commands: argparse._SubParsersAction) -> None:
    """The options of `verify`: one for each size of a layout."""
    from perl_megatron.verification.layout import NUM_LAYERS, OPTIONS

    description = "a tiny policy in one layout against transformers; status 1 where they differ"
    verify = commands.add_parser("verify", help=description, description=description)
    verify.set_defaults(handler=run_verify)
    for field, option in OPTIONS.items():
        name = field.replace("_", " ")
        if field == "sequence":
            verify.add_argument(option, dest=field, action="store_true", help=f"{name} parallelism")
        elif field == "vision":
            verify.add_argument(option, choices=("sharded", "replicated"), default="sharded", help="the vision tower")
        elif field.endswith("_layers"):
            verify.add_argument(option, dest=field, type=positive, metavar="N", help=f"{name} (default: as the others)")
        else:
            text = f"size of {name} parallelism"
            verify.add_argument(option, dest=field, type=positive, default=1, metavar="N", help=text)
    text = f"of the tiny policy's language model (default: {NUM_LAYERS})"
    verify.add_argument("--layers", type=positive, default=NUM_LAYERS, metavar="N", help=text)
    output = verify.add_mutually_exclusive_group()
    output.add_argument("--tied", action="store_true", help="the output layer is the embedding, as in the 3B model")
    output.add_argument("--untied", dest="tied", action="store_false", help="it has its own matrix (default)")
    verify.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    verify.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    verify.add_argument("--json", type=Path, metavar="FILE", help="write every row with all its tensors")


def add_triage(commands: argparse._SubParsersAction) -> None:
    """The options of `triage`."""
    description = (
        "from recorded rollouts, says whether a mismatch between engine and trainer comes from token ids, pixels, "
        "mRoPE positions, weights or kernels; status 1 where there is one"
    )
    triage = commands.add_parser("triage", help=description, description=description)
    triage.set_defaults(handler=run_triage)
    triage.add_argument("dump", type=Path, metavar="DUMP", help="run folder, or one file of its rollouts folder")
    folder = "Hugging Face folder, torch_dist folder or training checkpoint"
    text = f"the weights that sampled the rollouts: {folder} (default: the run's own of that version)"
    triage.add_argument("--policy", type=Path, metavar="FOLDER", help=text)
    text = "weights that may have been in use instead, beside those of the run; may be given several times"
    triage.add_argument("--other-policy", type=Path, action="append", default=[], metavar="FOLDER", help=text)
    triage.add_argument("--limit", type=positive, default=16, metavar="N", help="rollouts to look at (default: 16)")
    triage.add_argument("--json", type=Path, metavar="FILE", help="write every hypothesis")


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def run_job(options: argparse.Namespace, argv: list[str]) -> int:
    """Start the processes that the layout needs, or be one of them."""
    from perl_megatron.launch import torchrun

    loaded = load_config(options.config, options.overrides)
    by_endpoint = options.command == "eval" and loaded.config.evaluation.ask == "endpoint"
    if torchrun.needs_launch(loaded.config) and not by_endpoint:
        processes = launched_processes(loaded.config)
        check_before_start(loaded, options, processes)
        from perl_megatron.observability.run_folder import RunFolder

        logs = RunFolder.of(loaded.config).logs
        return torchrun.launch(argv, num_processes=processes, log_dir=logs, master_port=options.master_port)
    check_before_start(loaded, options, torchrun.num_started_processes())
    from perl_megatron.runtime import environment

    environment.prepare_process()  # before torch is imported
    with garbage.paused():
        from perl_megatron.runtime import platform

        platform.install()  # before anything imports megatron-core or transformers
        from perl_megatron import jobs

    return jobs.run(options.command, loaded, resume=getattr(options, "resume", False))


def check_before_start(loaded: LoadedConfig, options: argparse.Namespace, world_size: int) -> None:
    """All that can be checked without torch: layout, files, run folder. Nothing is created."""
    from perl_megatron.observability.run_folder import RunFolder

    config, command = loaded.config, options.command
    if command == "eval":
        from perl_megatron.evaluation.preflight import check_evaluation

        check_evaluation(config)
        if config.evaluation.ask == "endpoint":
            return  # which needs neither the policy nor a layout
    derive(config, world_size=world_size, architecture=read_architecture_numbers(config.model.path), command=command)
    if command != "eval":
        require_training_data(config)
        folder = RunFolder.of(config)
        folder.check_available(resume=options.resume)
        if options.resume:
            folder.check_same_run(config)


def run_serve(options: argparse.Namespace, argv: list[str]) -> int:
    """Be a server until the process is told to end."""
    config = load_config(options.config, options.overrides).config
    from perl_megatron.runtime import environment, signals

    if options.ignore_sigterm:
        signals.leave_only_interrupt()  # before there are threads
    environment.prepare_process()  # before torch is imported
    with garbage.paused():
        from perl_megatron.runtime import platform

        platform.install()  # before anything imports transformers
        from perl_megatron import serving

    how = {"max_images": options.max_images, "log_requests": options.log_requests}
    return serving.serve(config, host=options.host, port=options.port, **how)


def run_verify(options: argparse.Namespace, argv: list[str]) -> int:
    """Check one layout against transformers, in as many processes as it needs; status 0 only if all rows pass."""
    from perl_megatron.launch import torchrun
    from perl_megatron.launch.verdict import launch_for_verdict, verdict_status
    from perl_megatron.verification.layout import OPTIONS, Layout

    sizes = {field: getattr(options, field) for field in OPTIONS}
    how = {"tied": options.tied, "recompute": options.recompute, "dtype": options.dtype, "num_layers": options.layers}
    layout = Layout.of(sizes, **how)
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError("the folder does not exist", where=f"--json {options.json}", fix="create it first")
    config = layout.config(Path())  # for the number of processes; the policy is not made yet
    if torchrun.needs_launch(config):
        layout.check(launched_processes(config))
        processes = launched_processes(config)
        return launch_for_verdict(argv, num_processes=processes, json_file=options.json, key="passed")
    layout.check(torchrun.num_started_processes())
    from perl_megatron.runtime import environment

    environment.prepare_process()  # before torch is imported
    with garbage.paused():
        from perl_megatron.runtime import platform

        platform.install()  # before anything imports megatron-core or transformers
        from perl_megatron.verification import command

    return verdict_status(command.run(layout, options.json))


def run_verify_weights(options: argparse.Namespace, argv: list[str]) -> int:
    """Compare two checkpoints; status 0 only where every tensor has the same bits."""
    from perl_megatron.checkpoint.compare import compare_checkpoints, render
    from perl_megatron.checkpoint.open_weights import open_weights

    first, second, model = options.first, options.second, options.model
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError("the folder does not exist", where=f"--json {options.json}", fix="create it first")
    with_config = [folder for folder in (model, first, second) if folder and (folder / "config.json").is_file()]
    described_by = with_config[0] if with_config else None
    comparison = compare_checkpoints(*(open_weights(folder, config=described_by) for folder in (first, second)))
    print(render(comparison))  # first, as writing may fail
    if options.json is not None:
        options.json.write_text(comparison.as_json() + "\n", encoding="utf-8")
    return 0 if comparison.equal else 1


def run_triage(options: argparse.Namespace, argv: list[str]) -> int:
    """Judge recorded rollouts; status 0 only where engine and trainer agree with transformers."""
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError("the folder does not exist", where=f"--json {options.json}", fix="create it first")
    from perl_megatron.runtime import environment

    environment.prepare_process()  # before torch is imported
    with garbage.paused():
        from perl_megatron.runtime import platform

        platform.set_threads()
        platform.install()  # before anything imports transformers
        from perl_megatron.triage import command

    settings = {"policy": options.policy, "other_policies": options.other_policy, "limit": options.limit}
    return 0 if command.run(options.dump, json_file=options.json, **settings) else 1


def run_results(options: argparse.Namespace, argv: list[str]) -> int:
    """Print the table of results."""
    from perl_megatron.evaluation import results_command

    results_command.run(options.folders, markdown_file=options.markdown, difference=options.difference)
    return 0


def _live_loss_kernel() -> str | None:
    """None without torch, which doctor reports."""
    if importlib.util.find_spec("torch") is None:
        return None
    from perl_megatron.kernels.dispatch import choose_backend, describe

    return describe(choose_backend())


def run_doctor(options: argparse.Namespace, argv: list[str]) -> int:
    """Print the state of this installation."""
    from perl_megatron.runtime.doctor import examine, render

    report = examine(loss_kernel=_live_loss_kernel())
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
