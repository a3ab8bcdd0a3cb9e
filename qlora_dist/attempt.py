"""Who has a run now, and which attempt it is.

``owner.json`` keeps a second launcher out. It is stale when its process is gone (host, boot, pid
and start time tell) or its job is over (the scheduler tells), together with every rank of its last
attempt; never by age.
"""

import contextlib
import errno
import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_dist.checkpoints import newest_step
from qlora_dist.code_tree import recorded
from qlora_dist.control import ask_to_kill
from qlora_dist.errors import QLoRAError, RunDirError
from qlora_dist.files import fsync_dir, write_json
from qlora_dist.layout import RunDir, newest_attempt
from qlora_dist.process import Process
from qlora_dist.ranks import live_ranks
from qlora_dist.scheduler import SlurmJob

# Ranks whose launcher was killed notice at once, save and go; those that hang end a little later
# (qlora_dist.train.pulse). This is how long a successor waits before it kills them.
ORPHAN_WAIT_S = 150.0


@contextmanager
def own(run: RunDir, job: SlurmJob | None = None) -> Iterator[int]:
    """Have the run for the length of a ``with`` block, as its next attempt.

    Args:
        run: The run directory.
        job: The job that has it; None for this process.

    Yields:
        The attempt's number.

    Raises:
        RunDirError: Another launcher has it, or may have it.
    """
    me = asdict(job or Process.this())
    with _exclusive(run):
        _refuse_if_owned(run, job)
        _wait_for_orphans(run)
        write_json(run.owner_json, me)
    try:
        yield _new_attempt(run, me)
    finally:
        with _exclusive(run):
            if _read(run.owner_json) == me:
                run.owner_json.unlink()


def note(run: RunDir, attempt: int, **facts: object) -> None:
    """Add to what an attempt's attempt.json says."""
    path = run.attempt(attempt) / "attempt.json"
    write_json(path, {**(_read(path) or {}), **facts})


@contextmanager
def idle(run: RunDir) -> Iterator[None]:
    """Keep every launcher out for the length of a ``with`` block, without beginning an attempt.

    Raises:
        RunDirError: A launcher has the run, or may have it.
    """
    with _exclusive(run):
        _refuse_if_owned(run)
        yield


@contextmanager
def _exclusive(run: RunDir) -> Iterator[None]:
    """Look at owner.json and change it without another launcher in between."""
    run.control.mkdir(mode=0o700, exist_ok=True)
    with (run.control / "owner.lock").open("w", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            # Some shared file systems have no locks; then two launchers that start at the same
            # moment are not told apart.
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
        yield


def _refuse_if_owned(run: RunDir, job: SlurmJob | None = None) -> None:
    tree = _read(run.owner_json)
    if tree is None:
        return
    try:
        owner: SlurmJob | Process = SlurmJob(**tree) if "job" in tree else Process(**tree)
    except TypeError:
        raise RunDirError(f"{run.owner_json} is damaged; if no launcher runs, remove it") from None
    if isinstance(owner, SlurmJob):
        # A job that was requeued comes back to what its last execution left.
        if (job is None or owner.job != job.job) and not owner.is_gone():
            raise RunDirError(
                f"{run.root} is already being run by job {owner.job}; wait for it, or end it with: "
                f"scancel {owner.job}"
            )
        return
    gone = owner.is_gone()
    if gone is None:
        raise RunDirError(
            f"{run.root} belongs to process {owner.pid} on {owner.host}. If that machine is gone "
            f"for good, remove {run.owner_json}"
        )
    if not gone:
        raise RunDirError(
            f"{run.root} is already being run by process {owner.pid} on this machine; wait for it, "
            f"or stop it with: kill {owner.pid}"
        )


def _wait_for_orphans(run: RunDir) -> None:
    number = newest_attempt(run)
    deadline = time.monotonic() + ORPHAN_WAIT_S
    while number is not None and (alive := live_ranks(run, number)):
        if time.monotonic() > deadline + ORPHAN_WAIT_S:
            pids = ", ".join(str(process.pid) for process in alive)
            raise QLoRAError(
                f"{run.root}: processes of its last attempt cannot be killed here: {pids}"
            )
        if time.monotonic() > deadline:
            for process in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.1)


def _new_attempt(run: RunDir, me: dict[str, Any]) -> int:
    newest = newest_attempt(run)
    number = 0 if newest is None else newest + 1
    folder = run.attempt(number)
    for part in (folder / "ranks", folder / "beats", folder / "logs"):
        part.mkdir(mode=0o700, parents=True)
    if newest is not None:
        # Slurm gives a node up that it cannot reach; one that still reaches the storage ends here.
        ask_to_kill(run, newest, f"attempt {number} has begun")
    write_json(
        folder / "attempt.json",
        {
            "attempt": number,
            "started_at": time.time(),
            "launcher": me,
            "began_after": newest_step(run.checkpoints),
            "code": (recorded(run) or {}).get("sha256"),
        },
    )
    fsync_dir(run.attempts)
    return number


def _read(path: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}
