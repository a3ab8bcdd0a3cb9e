"""The words of the command line; docs/cli.md is made from them."""

import argparse
from collections.abc import Callable
from pathlib import Path

from qlora_dist import __version__
from qlora_launch import commands

_INTRO = """\
One YAML file to a trained QLoRA adapter.

  qlora plan configs/guanaco-7b.yaml            what the run takes, and whether it fits
  qlora data configs/guanaco-7b.yaml --show 3   what it will learn, token by token
  qlora run  configs/guanaco-7b.yaml            train; Ctrl-C saves and stops
  qlora resume runs/guanaco-7b                  go on from the last committed step

Any key of the file can be given on the command line: qlora run x.yaml optimizer.lr=1e-4
"""


def make_parser() -> argparse.ArgumentParser:
    """The whole command line; docs/cli.md is made from it."""
    parser = argparse.ArgumentParser(
        prog="qlora", description=_INTRO, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"qlora-dist {__version__}")
    parser.set_defaults(call=None, rest=None)
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")

    def verb(
        name: str, call: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(call=call)
        return sub

    plan = verb(
        "plan", commands.plan_command, "say what a run takes: processes, steps, memory, and why"
    )
    _config_arguments(plan)
    plan.add_argument("--json", action="store_true", help="for programs")

    run = verb(
        "run", commands.run_command, "start a run, or go on with it if its directory is there"
    )
    _config_arguments(run)
    run.add_argument(
        "--dry-run", action="store_true", help="print every file, argv and variable, and stop"
    )
    run.add_argument(
        "--prepare",
        action="store_true",
        help="write the run directory and stop; start it with qlora resume or accelerate launch",
    )

    submit = verb(
        "submit",
        commands.submit_command,
        "the same as a Slurm job: run with resources.backend=slurm",
    )
    _config_arguments(submit)
    submit.add_argument("--dry-run", action="store_true", help="print the batch script and stop")
    submit.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="a run for each value, as one array; several --sweep make all combinations",
    )
    submit.add_argument(
        "--parallel", type=_positive, metavar="N", help="runs of a sweep at once; all if absent"
    )
    submit.add_argument(
        "--after",
        action="append",
        default=[],
        metavar="JOB",
        help="start once this job, or the job of this run directory, has ended well",
    )

    drill = verb(
        "drill",
        commands.drill_command,
        "do a fault to a short run of a config, on its own cluster, and see whether it comes back",
    )
    _config_arguments(drill)
    drill.add_argument(
        "--fault",
        required=True,
        choices=["sigterm", "sigkill", "exception", "hang", "requeue", "warning", "preemption"],
        help="the last three are Slurm's: scontrol requeue, the signal before a time limit, the "
        "signal of a preemption",
    )
    drill.add_argument(
        "--steps", type=_positive, default=20, metavar="N", help="length of the run (20)"
    )

    resume = verb(
        "resume", commands.resume_command, "go on with a run from its last committed step"
    )
    _run_argument(resume)
    _overrides_argument(resume)
    resume.add_argument("--dry-run", action="store_true", help="print what would be started")

    status = verb(
        "status", commands.status_command, "say where a run stands, and what its attempts were"
    )
    _run_argument(status)
    status.add_argument("--json", action="store_true", help="for programs")

    runs = verb("list", commands.list_command, "say where every run of a folder stands")
    runs.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER")

    logs = verb("logs", commands.logs_command, "print what a run's newest attempt has said")
    _run_argument(logs)
    logs.add_argument(
        "-f", "--follow", action="store_true", help="go on until the run ends, and exit as it does"
    )
    logs.add_argument("--rank", type=_count, metavar="N", help="what one process printed instead")

    cancel = verb(
        "cancel", commands.cancel_command, "have a run save and end, and not start again by itself"
    )
    _run_argument(cancel)

    prefetch = verb(
        "prefetch",
        commands.prefetch_command,
        "fetch what a run needs of the hub, for jobs on nodes without internet",
    )
    prefetch.add_argument("config", metavar="CONFIG", help="YAML file, or a run directory")
    _overrides_argument(prefetch)

    doctor = verb(
        "doctor",
        commands.doctor_command,
        "read a Slurm cluster's settings, and say what it will do to a run, what that can cost, "
        "and what to change",
    )
    doctor.add_argument("config", metavar="CONFIG|RUN", help="YAML file, or run directory")
    _overrides_argument(doctor)
    doctor.add_argument(
        "--cluster", metavar="PROFILE", help="a name in slurm/clusters, or a YAML file"
    )
    doctor.add_argument("--json", action="store_true", help="for programs")

    data = verb("data", commands.data_command, "read and tokenise a run's data, and show it")
    _config_arguments(data)
    data.add_argument(
        "--show", type=_count, default=0, metavar="N", help="print N samples, learned tokens marked"
    )
    data.add_argument("--json", action="store_true", help="for programs")

    quantize = verb(
        "quantize", commands.quantize_command, "write the base in NF4 into quantization.cache_dir"
    )
    _config_arguments(quantize)

    consolidate = verb(
        "consolidate",
        commands.consolidate_command,
        "write a checkpoint as RUN/adapter, for PEFT, or RUN/model",
    )
    _run_argument(consolidate)
    consolidate.add_argument(
        "--checkpoint", default="last", metavar="WHICH", help="last, best, or a step"
    )

    export = verb(
        "export",
        commands.export_command,
        "merge the adapter into the base, as RUN/merged in 16 bits",
    )
    _run_argument(export)
    export.add_argument("--output", type=Path, help="another folder to write")
    export.add_argument(
        "--base",
        choices=["16bit", "dequantized", "auto"],
        default="auto",
        help="the base as it was published, as training quantised it, or whichever measures nearer "
        "to the trained model (default)",
    )
    export.add_argument(
        "--no-check",
        action="store_true",
        help="neither load nor measure what was written; not with --base auto",
    )

    generate = verb(
        "generate",
        commands.generate_command,
        "answer prompts with a run, an adapter or a merged model",
    )
    generate.add_argument("model", metavar="MODEL", help="run directory, adapter or model folder")
    generate.add_argument(
        "prompt", nargs="*", help="one prompt each; read from standard input, a line each, if none"
    )
    generate.add_argument("--base", action="store_true", help="the run's base without its adapter")
    generate.add_argument(
        "--raw", action="store_true", help="give the prompt as it is, without a template"
    )
    generate.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N")
    generate.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="0 picks the likeliest token",
    )
    generate.add_argument("--top-p", type=_probability, default=0.9, metavar="P")
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(rest="prompt")
    return parser


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    _overrides_argument(parser)


def _overrides_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="such as optimizer.lr=1e-4"
    )
    parser.set_defaults(rest="overrides")


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory")


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def _probability(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not over 0 and at most 1")
    return value
