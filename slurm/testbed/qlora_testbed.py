"""A real Slurm on one machine, in a folder of its own: see README.md beside this file."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from qlora_dist.errors import QLoRAError, UserError
from qlora_testbed_cluster import Testbed
from qlora_testbed_conf import Settings

__all__ = ["Settings", "Testbed", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: ``up``, ``down``, ``status`` and ``env``, each of a folder."""
    parsed = _parser().parse_args(arguments)
    try:
        _VERBS[parsed.verb](parsed)
    except QLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _up(parsed: argparse.Namespace) -> None:
    try:
        settings = Settings(
            num_nodes=parsed.nodes,
            gpus_per_node=parsed.gpus,
            accounting=parsed.accounting,
            grace_s=parsed.grace,
            preempt_send_user_signal=parsed.user_signal,
            preempt_mode=parsed.preempt_mode,
            job_requeue=not parsed.no_job_requeue,
            proctrack=parsed.proctrack,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    testbed = Testbed(parsed.folder, settings)
    testbed.up()
    print(f"Slurm is up, with {settings.num_nodes} nodes. Next:\n")
    print(_exports(testbed))
    print("sinfo")
    print("sbatch --mem=100 --partition=low --wrap 'srun hostname'")
    if settings.accounting:
        print("sacct")
    print("\nTo take it down:\n")
    print(shlex.join([sys.executable, str(_script()), "down", str(parsed.folder)]))


def _down(parsed: argparse.Namespace) -> None:
    _existing(parsed.folder).down()
    print("Slurm is down. In a shell that was told of it: unset SLURM_CONF")


def _status(parsed: argparse.Namespace) -> None:
    testbed = _existing(parsed.folder)
    print(f"daemons: {', '.join(testbed.alive()) or 'none'}")
    if "slurmctld" in testbed.alive():
        print(testbed.run("sinfo"), testbed.run("squeue"), sep="", end="")
    for found in testbed.processes():
        print(f"{found.node} {found.process.pid} {found.command}")


def _env(parsed: argparse.Namespace) -> None:
    print(_exports(_existing(parsed.folder)))


_VERBS = {"up": _up, "down": _down, "status": _status, "env": _env}


def _existing(folder: Path) -> Testbed:
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder; a testbed is made by: up {shlex.quote(str(folder))}"
        )
    return Testbed(folder)


def _exports(testbed: Testbed) -> str:
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in testbed.env.items())


def _script() -> Path:
    here = Path(__file__)
    return here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", help="bring one up, from nothing")
    default = Settings()
    up.add_argument("--nodes", type=int, default=default.num_nodes)
    up.add_argument("--gpus", type=int, default=default.gpus_per_node, help="a node; only counted")
    up.add_argument("--accounting", action="store_true", help="MariaDB and slurmdbd behind sacct")
    up.add_argument("--grace", type=int, default=default.grace_s, metavar="S", help="GraceTime")
    up.add_argument("--user-signal", action="store_true", help="preempt_send_user_signal")
    modes = ("REQUEUE", "CANCEL", "SUSPEND", "OFF")
    up.add_argument("--preempt-mode", choices=modes, default=default.preempt_mode)
    up.add_argument("--no-job-requeue", action="store_true", help="JobRequeue=0")
    up.add_argument("--proctrack", choices=("linuxproc", "pgid"), default=default.proctrack)
    for name, words in (
        ("down", "end it: daemons and jobs"),
        ("status", "its daemons, nodes, queue and jobs' processes"),
        ("env", "what to export, for a shell to eval"),
    ):
        verbs.add_parser(name, help=words)
    for verb in verbs.choices.values():
        verb.add_argument("folder", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
