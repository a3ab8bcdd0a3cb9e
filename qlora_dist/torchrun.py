"""Starting torchrun on one node; how it does so is the same on a workstation and in a job."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from qlora_dist.code_tree import path_env
from qlora_dist.environment import allowed, redacted
from qlora_dist.files import write_json
from qlora_dist.layout import RunDir
from qlora_dist.process import die_with_parent

# One machine by itself.
ALONE = ("--standalone",)
# Names beyond the allow-list, parted by spaces, that a job's script adds to command.json's.
PASS_ENV = "QLORA_PASS_ENV"


def torchrun_argv(rendezvous: Sequence[str], options: Sequence[str], root: Path) -> list[str]:
    """Arguments of torchrun for a run.

    Neither the interpreter nor the folder is written down anywhere: the interpreter is the one that
    the caller runs in, and a run that was moved is started where it lies.
    """
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *rendezvous,
        *options,
        "-m",
        "qlora_dist.train.worker",
        str(root),
    ]


def pass_env(run: RunDir, env: Mapping[str, str]) -> list[str]:
    """Names and patterns beyond the allow-list: the spec's, and those that a job's script adds."""
    command = json.loads(run.command_json.read_text(encoding="utf-8"))
    return [*command.get("pass_env", []), *env.get(PASS_ENV, "").split()]


def process_env(
    run: RunDir, attempt: int, env: Mapping[str, str], extra: Mapping[str, str]
) -> dict[str, str]:
    """The whole environment of an attempt's training processes.

    Args:
        run: The run directory; its code comes first on Python's path.
        attempt: Number of the attempt.
        env: Environment of the launcher, of which they get what is allowed.
        extra: Variables beyond command.json's.

    Raises:
        PlanError: The run directory's name cannot be on Python's path.
    """
    command = json.loads(run.command_json.read_text(encoding="utf-8"))
    return {
        **allowed(env, pass_env(run, env)),
        **command["env"],
        **extra,
        **path_env(run.root, env.get("PYTHONPATH")),
        "QLORA_ATTEMPT": str(attempt),
    }


def note_env(
    run: RunDir,
    attempt: int,
    env: Mapping[str, str],
    got: Mapping[str, str],
    *,
    left_out: Collection[str] = (),
) -> None:
    """Write down what an attempt's processes got, and the names of what they did not get.

    A note: a disk that refuses it keeps no run from starting.

    Args:
        run: The run directory.
        attempt: Number of the attempt.
        env: Environment of the launcher.
        got: That of the processes.
        left_out: Names that the launcher did not get either.
    """
    names = sorted({*left_out, *env} - {*got})
    with contextlib.suppress(OSError):
        write_json(run.environment_json(attempt), {"variables": redacted(got), "left_out": names})


def start_torchrun(
    run: RunDir, rendezvous: Sequence[str], log: Path, env: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    """Start torchrun with what command.json says, in a session of its own.

    A session of its own: a terminal's Ctrl-C is for the launcher. It ends with its parent.

    Args:
        run: The run directory.
        rendezvous: Options that say where the nodes meet.
        log: File that takes what it prints.
        env: Its whole environment (:func:`process_env`).
    """
    command = json.loads(run.command_json.read_text(encoding="utf-8"))
    with log.open("ab") as file:
        return subprocess.Popen(
            torchrun_argv(rendezvous, command["torchrun"], run.root),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=die_with_parent,
            env=dict(env),
        )
