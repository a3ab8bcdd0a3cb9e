"""``python -m qlora_dist.batch RUN``: a Slurm job's batch process, the one owner of what follows.

It begins an attempt, starts one task a node, turns signals into the stop file, and decides at the
end, outside the training processes, whether the job goes back into the queue. Every decision is in
the attempt's attempt.json before it is carried out.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from qlora_dist import ends
from qlora_dist.attempt import note, own
from qlora_dist.checkpoints import newest_step
from qlora_dist.code_tree import check_code
from qlora_dist.ends import RankEnd, read_rank_ends, worst
from qlora_dist.environment import for_sbatch
from qlora_dist.errors import QLoRAError
from qlora_dist.layout import RunDir
from qlora_dist.ledger import last_step
from qlora_dist.scheduler import JobView, SchedulerError, SlurmJob, requeue, run_command, show_job
from qlora_dist.torchrun import pass_env

# What follows an attempt; "requeued" was Slurm's own doing.
Next = Literal["nothing", "requeue", "requeued", "new job"]

_STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_POLL_S = 0.1
# Attempts in a row that fail without a newly committed step, before the run is given up.
MAX_FAILURES = 3
# The same for attempts that were only stopped: a run that is stopped before its first step each
# time would go through the queue for ever.
MAX_IDLE = 10


def main(run_path: str) -> int:
    """Run one execution of a job; returns its exit code."""
    run, job = RunDir(Path(run_path)), SlurmJob.this()
    stops = _Stops()
    try:
        with own(run, job) as attempt:
            stops.watch(run.stop_file(attempt))
            note(run, attempt, nodes=os.environ["SLURM_JOB_NODELIST"])
            end = _run(run, attempt, stops)
            # A step may be committed after its last rank has said how it ended.
            step = newest_step(run.checkpoints)
            view = _ask(job)
            codes = [end.code, *codes_without_progress(run, step)]
            following, why = decide(
                end,
                job,
                view,
                failures=_failures(codes),
                idle=len(codes),
                cancelled=run.cancel_file.exists(),
            )
            note(
                run,
                attempt,
                ended_at=time.time(),
                end=asdict(end),
                last_step=last_step(run, attempt),
                committed_step=step,
                signals=stops.received,
                next=following,
                why=why,
            )
    except QLoRAError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(f"attempt {attempt}: {end.cause}; next: {following}, {why}\n")
    sys.stdout.flush()
    # From here on a signal has nothing left to stop.
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    return _follow(run, job, following, end.code)


def decide(
    end: RankEnd,
    job: SlurmJob,
    view: JobView | None,
    *,
    failures: int,
    idle: int = 0,
    cancelled: bool = False,
) -> tuple[Next, str]:
    """What follows an attempt; the one rule by which a run is requeued.

    Args:
        end: How it ended.
        job: This execution.
        view: The job as Slurm shows it now; None if Slurm does not answer.
        failures: Attempts in a row, this one counted, that failed without a new committed step.
        idle: Attempts in a row, this one counted, that committed no step, however they ended.
        cancelled: Whether `qlora cancel` was called.

    Returns:
        What to do, and why, for a person.
    """
    if end.code in (ends.DONE, ends.USER_ERROR, ends.NEVER_RESTART):
        return "nothing", "a restart would change nothing"
    if view is not None and view.restarts != job.restart:
        return "requeued", "Slurm has requeued it already"
    if cancelled or (
        view is not None and view.state == "COMPLETING" and view.reason != "TimeLimit"
    ):
        return "nothing", "it was cancelled"
    if failures >= MAX_FAILURES:
        return "nothing", f"{failures} attempts in a row failed without a new committed step"
    if idle >= MAX_IDLE:
        return "nothing", f"{idle} attempts in a row committed no step"
    if view is not None and not view.requeue:
        return "new job", "this job may not be requeued"
    return "requeue", "it goes on from its last committed step"


def codes_without_progress(run: RunDir, step: int) -> list[int]:
    """How the attempts before this one ended, newest first, since a step was last committed."""
    codes = []
    for folder in sorted(run.attempts.iterdir(), reverse=True):
        tree = json.loads((folder / "attempt.json").read_text(encoding="utf-8"))
        if "end" in tree:
            if tree["committed_step"] != step:
                break
            codes.append(int(tree["end"]["code"]))
    return codes


def _failures(codes: Sequence[int]) -> int:
    """How many of the first codes are failures, in a row."""
    stopped = [code in (ends.PREEMPTED, ends.TIME_LIMIT, ends.DONE) for code in codes]
    return stopped.index(True) if True in stopped else len(codes)


class _Stops:
    """Signals to the batch process; each asks the ranks to save and end."""

    def __init__(self) -> None:
        self.received: list[str] = []
        self._file: Path | None = None
        for number in _STOPS:
            signal.signal(number, self._on_signal)

    def watch(self, file: Path) -> None:
        """Say which file asks the ranks."""
        self._file = file
        if self.received:
            self._touch()

    def _on_signal(self, number: int, _frame: types.FrameType | None) -> None:
        self.received.append(signal.Signals(number).name)
        self._touch()

    def _touch(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.touch(mode=0o600)


def _run(run: RunDir, attempt: int, stops: _Stops) -> RankEnd:
    """Run the attempt, unless what it would execute is not the run's own code."""
    try:
        check_code(run)
    except QLoRAError as error:
        return RankEnd(0, error.exit_code, str(error), newest_step(run.checkpoints), time.time())
    return _run_nodes(run, attempt, stops)


def _run_nodes(run: RunDir, attempt: int, stops: _Stops) -> RankEnd:
    """Start a task on each node, and wait until the ranks, or all tasks, have ended."""
    world_size = json.loads(run.command_json.read_text(encoding="utf-8"))["world_size"]
    ranks = run.attempt(attempt) / "ranks"
    process = _srun(
        [
            "--ntasks-per-node=1",
            # The other nodes have a save to finish, whatever one task ends with.
            "--kill-on-bad-exit=0",
            "--wait=0",
            f"--output={run.attempt(attempt) / 'logs' / 'node_%n.log'}",
            "--open-mode=append",
            *(sys.executable, "-m", "qlora_dist.node", str(run.root), str(attempt)),
            *(socket.gethostname(), str(_free_port())),
        ]
    )
    while process.poll() is None:
        # After a signal the job is killed soon: torchrun's own end is not waited for.
        if stops.received and ends.all_ended(ranks, world_size=world_size):
            break
        time.sleep(_POLL_S)
    return worst(read_rank_ends(ranks, world_size=world_size))


def _srun(args: Sequence[str]) -> "subprocess.Popen[bytes]":
    """Start srun where a signal to the batch process's group does not reach it."""
    return subprocess.Popen(["srun", *args], stdin=subprocess.DEVNULL, start_new_session=True)


def _free_port() -> int:
    """A port that is free on this node, which is the job's first."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _ask(job: SlurmJob) -> JobView | None:
    try:
        return show_job(job.job)
    except SchedulerError as error:
        sys.stderr.write(f"{error}\n")
        return None


def _follow(run: RunDir, job: SlurmJob, following: Next, code: int) -> int:
    if following == "requeue":
        try:
            requeue(job.job)
        except SchedulerError as error:
            sys.stderr.write(f"{error}; submitting a new job instead\n")
            following = "new job"
    if following == "new job":
        script = run_command("scontrol", "write", "batch_script", job.job, "-")
        done = subprocess.run(
            ["sbatch", "--parsable", f"--dependency=afterany:{os.environ['SLURM_JOB_ID']}"],
            input=script.stdout,
            env=for_sbatch(os.environ, pass_env(run, os.environ)),
            text=True,
            check=False,
        )
        return code if done.returncode == 0 else ends.FAILED
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
