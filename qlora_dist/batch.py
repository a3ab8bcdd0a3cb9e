"""``python -m qlora_dist.batch LEAD_S RUN``: a Slurm job's batch process, the owner of requeueing.

It begins an attempt, has it run on the nodes, turns signals and the end of the job's time into a
stop, and decides at the end, outside the training processes, whether the job goes back into the
queue. Every decision is in the attempt's attempt.json before it is carried out.
"""

import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import asdict, replace
from pathlib import Path

from qlora_dist import ends
from qlora_dist.attempt import note, own
from qlora_dist.beats import Watch
from qlora_dist.checkpoints import newest_step
from qlora_dist.code_tree import check_code
from qlora_dist.control import ask_to_stop
from qlora_dist.deadline import Deadline
from qlora_dist.ends import RankEnd
from qlora_dist.environment import for_sbatch
from qlora_dist.errors import QLoRAError
from qlora_dist.layout import RunDir
from qlora_dist.ledger import bad_nodes, codes_without_progress, last_step
from qlora_dist.process_env import pass_env
from qlora_dist.requeue import Decision, decide
from qlora_dist.scheduler import (
    JobView,
    SchedulerError,
    SlurmJob,
    requeue,
    run_command,
    show_job,
    update_job,
)
from qlora_dist.step import Step

_STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def main(lead_s: str, run_path: str) -> int:
    """Run one execution of a job; returns its exit code.

    Args:
        lead_s: How long before the time limit Slurm warns, in seconds.
        run_path: The run directory.
    """
    run, job = RunDir(Path(run_path)), SlurmJob.this()
    stops = _Stops(Deadline(job.job, float(lead_s)))
    try:
        with own(run, job) as attempt:
            note(run, attempt, nodes=os.environ["SLURM_JOB_NODELIST"])
            stops.watch(run, attempt)
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
                decision = replace(decision, exclude=sorted({*bad_nodes(run), end.node}))
            note(
                run,
                attempt,
                ended_at=time.time(),
                end=asdict(end),
                last_step=last_step(run, attempt),
                committed_step=step,
                signals=stops.received,
                next=decision.following,
                why=decision.why,
            )
    except QLoRAError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(
        f"attempt {attempt}: {end.cause}; next: {decision.following}, {decision.why}\n"
    )
    sys.stdout.flush()
    # From here on a signal has nothing left to stop.
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    return _follow(run, job, decision, end.code)


def _run(run: RunDir, attempt: int, stops: "_Stops") -> RankEnd:
    """Run the attempt, unless what it would execute is not the run's own code."""
    try:
        check_code(run)
    except QLoRAError as error:
        return RankEnd(0, error.exit_code, str(error), newest_step(run.checkpoints), time.time())
    return Step(run, attempt, tick=stops.tick).run()


class _Stops:
    """Signals to the batch process, and its own clock; each asks the ranks to save and end."""

    def __init__(self, deadline: Deadline) -> None:
        self.received: list[str] = []
        self._deadline = deadline
        self._target: tuple[RunDir, int] | None = None
        for number in _STOPS:
            signal.signal(number, self._on_signal)
        deadline.update()

    def watch(self, run: RunDir, attempt: int) -> None:
        """Say which attempt is to be asked."""
        self._target = run, attempt
        if self.received:
            self._ask()

    def tick(self, watch: Watch) -> None:
        """Look at the clock."""
        self._deadline.update()
        if not self.received and self._deadline.due(watch.beats):
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
        if self._target is not None:
            ask_to_stop(*self._target, code)


def _ask(job: SlurmJob) -> JobView | None:
    try:
        return show_job(job.job)
    except SchedulerError as error:
        sys.stderr.write(f"{error}\n")
        return None


def _follow(run: RunDir, job: SlurmJob, decision: Decision, code: int) -> int:
    following = decision.following
    if following == "requeue":
        try:
            requeue(job.job)
        except SchedulerError as error:
            sys.stderr.write(f"{error}; submitting a new job instead\n")
            following = "new job"
        else:
            _change(job, decision)
    if following == "new job" and not _submit_again(run, job, decision):
        return ends.FAILED
    return code


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


def _submit_again(run: RunDir, job: SlurmJob, decision: Decision) -> bool:
    """Send this job's script again, to start when this job is over; whether Slurm took it."""
    script = run_command("scontrol", "write", "batch_script", job.job, "-")
    options = [f"--dependency=afterany:{os.environ['SLURM_JOB_ID']}"]
    if decision.wait_s:
        options.append(f"--begin=now+{decision.wait_s:.0f}")
    if decision.exclude:
        options.append(f"--exclude={','.join(decision.exclude)}")
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        # This element alone; the script speaks of all.
        options.append(f"--array={os.environ['SLURM_ARRAY_TASK_ID']}")
        options[0] = f"--dependency=afterany:{job.job}"
    done = subprocess.run(
        ["sbatch", "--parsable", *options],
        input=script.stdout,
        env=for_sbatch(os.environ, pass_env(run, os.environ)),
        text=True,
        check=False,
    )
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
