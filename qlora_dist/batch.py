"""``python -m qlora_dist.batch LEAD_S RUN``: a Slurm job's batch process, the owner of requeueing.

It begins an attempt, has it run on the nodes, turns signals and the end of the job's time into a
stop, and decides at the end, outside the training processes, whether the job goes back into the
queue. Every decision is in the attempt's attempt.json before it is carried out.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from qlora_dist import ends
from qlora_dist.attempt import note, own
from qlora_dist.beats import Watch
from qlora_dist.checkpoints import newest_step, storage_message
from qlora_dist.code_tree import check_code
from qlora_dist.control import ask_to_stop
from qlora_dist.deadline import Deadline
from qlora_dist.ends import RankEnd
from qlora_dist.environment import for_sbatch
from qlora_dist.errors import QLoRAError
from qlora_dist.layout import RunDir
from qlora_dist.ledger import bad_nodes, codes_without_progress, note_end
from qlora_dist.process_env import pass_env
from qlora_dist.requeue import Decision, Next, decide, given_up
from qlora_dist.scheduler import (
    JobView,
    SchedulerError,
    SlurmJob,
    ends_the_preempted,
    follow_instead,
    requeue,
    run_command,
    show_job,
    update_job,
)
from qlora_dist.step import Step

_STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Between tries where storage or Slurm do not answer: about ten minutes in all.
_WAITS_S = (1, 2, 5, 10, 30, 60, 120, 180, 180)
# How an attempt ended, and what follows.
_Outcome = tuple[RankEnd, Decision]


def main(lead_s: str, run_path: str) -> int:
    """Run one execution of a job; returns its exit code.

    Args:
        lead_s: How long before the time limit Slurm warns, in seconds.
        run_path: The run directory.
    """
    run, job = RunDir(Path(run_path)), SlurmJob.this()
    stops = _Stops(run, Deadline(job.job, float(lead_s)))
    try:
        end, decision = _patiently(lambda: _own_and_run(run, job, stops))
    except QLoRAError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(f"{end.cause}; next: {decision.following}, {decision.why}\n")
    sys.stdout.flush()
    # From here on a signal has nothing left to stop.
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    return _follow(run, job, decision, end.code)


def _patiently(begin: Callable[[], _Outcome]) -> _Outcome:
    """Begin, and begin again for a while where storage or Slurm do not answer at once.

    Raises:
        QLoRAError: They do not answer at all, or the run cannot be had.
    """
    for wait_s in (*_WAITS_S, None):
        try:
            return begin()
        except (OSError, SchedulerError) as error:
            sys.stderr.write(f"{error}\n")
            if wait_s is None:
                raise QLoRAError(f"given up: {error}") from error
            time.sleep(wait_s)
    raise AssertionError


def _own_and_run(run: RunDir, job: SlurmJob, stops: "_Stops") -> _Outcome:
    with own(run, job) as attempt:
        step = newest_step(run.checkpoints)
        idle = codes_without_progress(run, step)
        if why := "it was cancelled" if run.cancel_file.exists() else given_up(idle):
            return _note(run, attempt, _not_run(step, why), Decision("nothing", why))
        with contextlib.suppress(OSError):
            note(run, attempt, nodes=os.environ["SLURM_JOB_NODELIST"])
        stops.watch(attempt)
        end = _run(run, attempt, stops)
        view = _ask(job)
        end = stops.named(end, view)
        # A step may be committed after its last rank has said how it ended.
        step = newest_step(run.checkpoints)
        decision = decide(
            end,
            job,
            view,
            idle=[end.code, *codes_without_progress(run, step)],
            cancelled=run.cancel_file.exists(),
        )
        if end.code == ends.BAD_NODE and end.node:
            decision = replace(decision, exclude=_to_exclude(run, end.node, view))
        return _note(run, attempt, end, decision, signals=stops.received)


def _not_run(step: int, why: str) -> RankEnd:
    return RankEnd(0, ends.PREEMPTED, f"not begun: {why}", step, time.time())


def _note(
    run: RunDir, attempt: int, end: RankEnd, decision: Decision, *, signals: Sequence[str] = ()
) -> _Outcome:
    """Write down what an attempt was; a disk that refuses it changes nothing of what follows."""
    try:
        following, why = decision.following, decision.why
        note_end(run, attempt, end, signals=list(signals), next=following, why=why)
    except OSError as error:
        sys.stderr.write(f"{storage_message(error, run.attempt(attempt))}\n")
    return end, decision


def _to_exclude(run: RunDir, node: str, view: JobView | None) -> list[str]:
    """What the job leaves out already, and bad nodes, as long as enough others are left."""
    before = view.excluded if view is not None else ""
    bad = sorted({*bad_nodes(run), node})
    partition = os.environ.get("SLURM_JOB_PARTITION", "")
    shown = run_command("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N")
    left = set(shown.stdout.split()) - set(bad)
    if len(left) < int(os.environ["SLURM_JOB_NUM_NODES"]):
        sys.stderr.write(f"too few nodes would be left without {', '.join(bad)}: not left out\n")
        return []
    return [before, *bad] if before else bad


def _run(run: RunDir, attempt: int, stops: "_Stops") -> RankEnd:
    """Run the attempt, unless what it would execute is not the run's own code."""
    try:
        check_code(run)
    except QLoRAError as error:
        return RankEnd(0, error.exit_code, str(error), newest_step(run.checkpoints), time.time())
    return Step(run, attempt, tick=stops.tick).run()


class _Stops:
    """Signals to the batch process, `qlora cancel`, and the job's clock: each asks for a stop."""

    def __init__(self, run: RunDir, deadline: Deadline) -> None:
        self.received: list[str] = []
        self._run, self._deadline = run, deadline
        self._attempt: int | None = None
        for number in _STOPS:
            signal.signal(number, self._on_signal)
        deadline.update()

    def watch(self, attempt: int) -> None:
        """Say which attempt is to be asked."""
        self._attempt = attempt
        if self.received:
            self._ask()

    def tick(self, watch: Watch) -> None:
        """Look at the clock, and at what a user wants."""
        self._deadline.update()
        if self.received:
            return
        if self._run.cancel_file.exists():
            self.received.append("cancel")
            self._ask()
        elif self._deadline.due(watch.beats):
            self.received.append("the job's time is nearly over")
            self._ask(ends.TIME_LIMIT)

    def named(self, end: RankEnd, view: JobView | None) -> RankEnd:
        """The end under its right name, now that Slurm has been asked."""
        if end.code != ends.PREEMPTED or view is None:
            return end
        # At the limit itself, ranks get the signal of any stop; before, it may have been moved.
        warned = signal.SIGUSR1.name in self.received and self._deadline.warned(view)
        return replace(end, code=ends.TIME_LIMIT) if warned or view.reason == "TimeLimit" else end

    def _on_signal(self, number: int, _frame: types.FrameType | None) -> None:
        self.received.append(signal.Signals(number).name)
        warning = number == signal.SIGUSR1 and self._deadline.warned()
        self._ask(ends.TIME_LIMIT if warning else ends.PREEMPTED)

    def _ask(self, code: int = ends.PREEMPTED) -> None:
        if self._attempt is not None:
            ask_to_stop(self._run, self._attempt, code)


def _ask(job: SlurmJob) -> JobView | None:
    try:
        view = show_job(job.job)
        if view is not None and view.preempted and view.requeue:
            # Where Slurm requeues the preempted, it has done so by now, or somebody said scancel.
            view = replace(view, preempted=ends_the_preempted(view.partition))
    except SchedulerError as error:
        sys.stderr.write(f"{error}\n")
        return None
    return view


def _follow(run: RunDir, job: SlurmJob, decision: Decision, code: int) -> int:
    """Carry a decision out; a Slurm that does not answer is asked again for some minutes."""
    following: Next | None = decision.following
    for wait_s in (*_WAITS_S, None):
        if following not in ("requeue", "new job") or run.cancel_file.exists():
            return code
        try:
            if following == "requeue":
                requeue(job.job)
                _change(job, decision)
            else:
                _submit_again(run, job, decision)
            return code
        except SchedulerError as error:
            sys.stderr.write(f"{error}\n")
        following = _still(job, following)
        if wait_s is not None:
            time.sleep(wait_s)
    return ends.FAILED


def _still(job: SlurmJob, following: Next | None) -> Next | None:
    """What is still to be done after Slurm has refused it, or did not answer in time."""
    view = _ask(job)
    if view is None or following != "requeue":
        return following
    if view.restarts != job.restart or view.state == "PENDING":
        return None
    return "requeue" if view.requeue else "new job"


def _change(job: SlurmJob, decision: Decision) -> None:
    """Have the job that waits again wait longer, or go elsewhere; it runs without that too."""
    values = {}
    if decision.wait_s:
        values["StartTime"] = f"now+{decision.wait_s:.0f}"
    if decision.exclude:
        values["ExcNodeList"] = ",".join(decision.exclude)
    if values:
        try:
            update_job(job.job, **values)
        except SchedulerError as error:
            sys.stderr.write(f"{error}\n")


def _submit_again(run: RunDir, job: SlurmJob, decision: Decision) -> None:
    """Send this job's script again, to start when this job is over.

    Raises:
        SchedulerError: Slurm does not take it.
    """
    script = run_command("scontrol", "write", "batch_script", job.job, "-")
    if script.returncode:
        raise SchedulerError(f"scontrol write batch_script {job.job}: {script.stderr.strip()}")
    options = [f"--dependency=afterany:{job.job}"]
    if decision.wait_s:
        options.append(f"--begin=now+{decision.wait_s:.0f}")
    if decision.exclude:
        options.append(f"--exclude={','.join(decision.exclude)}")
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        # This element alone; the script speaks of all.
        options.append(f"--array={os.environ['SLURM_ARRAY_TASK_ID']}")
    done = subprocess.run(
        ["sbatch", "--parsable", *options],
        input=script.stdout,
        stdout=subprocess.PIPE,
        env=for_sbatch(os.environ, pass_env(run, os.environ)),
        text=True,
        check=False,
    )
    if done.returncode:
        raise SchedulerError("sbatch refused the job")
    new = done.stdout.partition(";")[0].strip()
    sys.stdout.write(f"continued by job {new}\n")
    sys.stdout.flush()
    try:
        follow_instead(job.job, new)
    except SchedulerError as error:
        # The run itself goes on.
        sys.stderr.write(f"{error}\n")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
