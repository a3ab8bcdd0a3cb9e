"""Starting torchrun on one node; how it does so is the same on a workstation and in a job."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_dist.layout import RunDir
from qlora_dist.process import die_with_parent

# One machine by itself.
ALONE = ("--standalone",)


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


def start_torchrun(
    run: RunDir, attempt: int, rendezvous: Sequence[str], log: Path, env: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    """Start torchrun with what command.json says, in a session of its own.

    A session of its own: a terminal's Ctrl-C is for the launcher. It ends with its parent.

    Args:
        run: The run directory.
        attempt: Number of the attempt.
        rendezvous: Options that say where the nodes meet.
        log: File that takes what it prints.
        env: Variables beyond command.json's.
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
            env=os.environ | dict(command["env"]) | dict(env) | {"QLORA_ATTEMPT": str(attempt)},
        )
