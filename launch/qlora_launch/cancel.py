"""Ending a run from outside, with every complete step saved."""

import os
import signal
from pathlib import Path

from qlora_dist.control import ask_to_stop
from qlora_dist.errors import UserError
from qlora_dist.layout import RunDir, newest_attempt, open_run, sweep_runs
from qlora_dist.ledger import standing
from qlora_dist.process import Process
from qlora_dist.scheduler import live_jobs, read_owner, run_command
from qlora_dist.spec import RunSpec


def cancel_sweep(folder: Path) -> list[str]:
    """Cancel every run of a sweep that runs or waits.

    Returns:
        What was done with each, for a person; empty for a folder that is no sweep.

    Raises:
        UserError: Slurm refuses.
    """
    lines = []
    for name in sweep_runs(folder):
        run, spec = open_run(folder / name)
        now = standing(run, spec)
        live = now.state in ("running", "queued")
        lines.append(f"{name}: {cancel(run, spec) if live else now.state}")
    return lines


def cancel(run: RunDir, spec: RunSpec) -> str:
    """Ask a running attempt to save and end, and take a waiting job out of the queue.

    A job is not killed: Slurm would give it seconds to save.

    Returns:
        What was done, for a person.

    Raises:
        UserError: Nothing runs or waits, or Slurm refuses.
    """
    now = standing(run, spec)
    if now.state == "unknown":
        run.cancel_file.touch(mode=0o600)
        return f"a job of the run that runs or starts will save and end; but {now.detail}"
    if now.state not in ("running", "queued"):
        raise UserError(f"{run.root}: nothing to cancel; the run is {now.state}")
    run.cancel_file.touch(mode=0o600)
    owner = read_owner(run.owner_json)
    if now.state == "running" and isinstance(owner, Process):
        os.kill(owner.pid, signal.SIGTERM)
        return f"process {owner.pid} saves and ends"
    attempt = newest_attempt(run)
    if now.state == "running" and attempt is not None:
        ask_to_stop(run, attempt)
        return f"{now.detail} saves and ends, and is not requeued"
    jobs = live_jobs(run.root)
    done = run_command("scancel", *jobs)
    if done.returncode:
        raise UserError(f"scancel: {done.stderr.strip()}")
    return f"job {', '.join(jobs)} is out of the queue"
