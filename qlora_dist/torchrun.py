"""torchrun on one node, from its start to its ranks' end; a workstation's is as a job's."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qlora_dist.layout import RunDir
from qlora_dist.process import be_killed_with_parent
from qlora_dist.ranks import dump_and_kill, end_ranks, mark_silent

# Ranks whose torchrun is gone notice at their next micro-batch, save and end; then they are killed.
_LAST_SAVE_S = 30.0
# torchrun sees within its monitor interval that its ranks are dead.
_NOTICE_S = 15.0
_POLL_S = 0.2
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
    run: RunDir, rendezvous: Sequence[str], log: Path, env: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    """Start torchrun with what command.json says, in a session of its own.

    A session of its own: a terminal's Ctrl-C is for the launcher. It ends with its parent.

    Args:
        run: The run directory.
        rendezvous: Options that say where the nodes meet.
        log: File that takes what it prints.
        env: Its whole environment (:func:`qlora_dist.process_env.process_env`).
    """
    command = json.loads(run.command_json.read_text(encoding="utf-8"))
    with log.open("ab") as file:
        return subprocess.Popen(
            torchrun_argv(rendezvous, command["torchrun"], run.root),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            # In a job it ignores SIGTERM. Its ranks have a SIGTERM of their own when it ends.
            preexec_fn=be_killed_with_parent,
            env=dict(env),
        )


def attend(
    process: "subprocess.Popen[bytes]",
    run: RunDir,
    attempt: int,
    ranks: Sequence[int],
    *,
    node: str = "",
    tick: Callable[[], None] = lambda: None,
) -> int:
    """Stay with torchrun until it and its ranks have ended, and each rank's end is known.

    Args:
        process: torchrun.
        run: The run directory.
        attempt: Number of the attempt.
        ranks: Global ranks of this node.
        node: Its name, for the ranks that say nothing.
        tick: Called several times a second.

    Returns:
        torchrun's exit code.
    """
    killed_at = None
    while process.poll() is None:
        tick()
        if killed_at is None and run.kill_file(attempt).exists():
            dump_and_kill(run, attempt, ranks)
            killed_at = time.monotonic()
        elif killed_at is not None and time.monotonic() - killed_at > _NOTICE_S:
            process.kill()
        time.sleep(_POLL_S)
    # Ranks lead sessions of their own, and can outlive a torchrun that was killed.
    end_ranks(run, attempt, ranks, after_s=_LAST_SAVE_S if killed_at is None else 0.0)
    mark_silent(run, attempt, ranks, node=node)
    return process.returncode
