"""A fault done on purpose to a short run of the user's own, beside the same run unbroken."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from qlora_dist import ends
from qlora_dist.errors import PlanError, QLoRAError
from qlora_dist.layout import RunDir, newest_attempt, open_run, run_dir_of
from qlora_dist.ledger import Standing, standing
from qlora_dist.plan import Plan
from qlora_dist.scheduler import live_jobs, run_command
from qlora_dist.spec import RunSpec
from qlora_launch.backends import get_backend
from qlora_launch.follow import follow
from qlora_launch.starting import Say, plan_of, write

# In the process itself, in the middle of a step of the first attempt.
INJECTED = ("sigterm", "sigkill", "exception", "hang")
# By the scheduler; a user may do these to a job of their own.
COMMANDS = {
    "requeue": ("scontrol", "requeue"),
    "warning": ("scancel", "--signal=USR1", "--batch"),
    "preemption": ("scancel", "--signal=TERM"),
}
# How often a run in the foreground is taken up again, as a user would.
_RESUMES = 3
_POLL_S = 1.0
# A step from the middle on, in the attempt that Slurm is to do something to.
_SLOW_S = 3


@dataclass(frozen=True)
class Report:
    """What came of a drill.

    Attributes:
        now: Where the struck run stands.
        differences: Where it differs from the unbroken one; empty if it came back exactly.
    """

    now: Standing
    differences: Sequence[str]

    @property
    def passed(self) -> bool:
        """Whether the run met its fault and came back exactly."""
        return self.now.state == "done" and self.met and not self.differences

    @property
    def met(self) -> bool:
        """Whether there was a fault to come back from, before the last step."""
        rows = self.now.attempts
        return len(rows) > 1 and rows[0].last_step < rows[-1].last_step


def drill_spec(spec: RunSpec, steps: int) -> RunSpec:
    """A short run of a spec: four saves, and the same bits each time."""
    schedule = spec.schedule.model_copy(update={"steps": steps, "epochs": None})
    checkpoint = spec.checkpoint.model_copy(update={"every_steps": max(1, steps // 4)})
    return spec.model_copy(
        update={"schedule": schedule, "checkpoint": checkpoint, "deterministic": True}
    )


def drill(spec: RunSpec, fault: str, config: str, *, say: Say) -> Report:
    """Run a short run twice, once with a fault, and compare.

    Args:
        spec: From :func:`drill_spec`.
        fault: One of ``INJECTED`` or ``COMMANDS``.
        config: The file that the spec is from, for messages.
        say: Takes what a person should see.

    Raises:
        PlanError: The fault is the scheduler's, and the run is not its.
        QLoRAError: The unbroken run failed.
    """
    if fault in COMMANDS and spec.resources.backend != "slurm":
        raise PlanError(
            f"--fault {fault} is done by Slurm; use resources.backend=slurm, or one of "
            + ", ".join(INJECTED)
        )
    folder = run_dir_of(spec).with_name(f"{run_dir_of(spec).name}-drill")
    say("first the run unbroken")
    whole = _write(spec, folder / "whole", config, say)
    _to_the_end(whole, say)
    if standing(*open_run(whole[0].root)).state != "done":
        raise QLoRAError(f"the run fails without any fault; see: qlora logs {whole[0].root}")
    say(f"now with a fault: {fault}")
    struck = _write(spec, folder / fault, config, say)
    with _injected(fault, struck[1]), _commanded(fault, struck[0], spec, say):
        _to_the_end(struck, say)
    # Not imported at the top: it needs torch.
    from qlora_dist.train.compare import differences

    now = standing(*open_run(struck[0].root))
    return Report(now, differences(whole[0], struck[0]) if now.state == "done" else ())


def _write(spec: RunSpec, root: Path, config: str, say: Say) -> tuple[RunDir, Plan]:
    if root.exists() and any(root.iterdir()):
        raise PlanError(f"{root} is there from an earlier drill; remove it, or set name=")
    # A drill makes its own folder of tokenised data only where the run has none.
    data = spec.data
    if data.store_dir is None:
        store_dir = run_dir_of(spec).parent / "corpora"
        data = data.model_copy(update={"store_dir": str(store_dir)})
    plan = plan_of(spec.model_copy(update={"run_dir": str(root), "data": data}), ask_hub=True)
    backend = get_backend(spec.resources.backend)
    return write(plan, backend, config, (), say=say), plan


def _to_the_end(written: tuple[RunDir, Plan], say: Say) -> None:
    run, plan = written
    backend = get_backend(plan.spec.resources.backend)
    for _ in range(1 + _RESUMES):
        end = backend.submit(run, plan, say=say)
        if end is None:
            follow(run, plan.spec, say=say, rank=None, to_the_end=True)
            return
        if end.code in (ends.DONE, ends.USER_ERROR, ends.NEVER_RESTART):
            return
        say(f"{end.cause}; going on as with: qlora resume {run.root}")


@contextmanager
def _injected(fault: str, plan: Plan) -> Iterator[None]:
    """Have the run's first attempt meet the fault between two saves, in its last rank.

    Where the fault is the scheduler's, the attempt becomes slow there, and waits for it.
    """
    steps, every = plan.spec.schedule.steps, plan.spec.checkpoint.every_steps
    assert steps is not None
    step, rank = steps // 2 + every // 2, plan.topology.world_size - 1
    if fault in INJECTED:
        count = plan.batch.accumulation * step + 1
        os.environ["QLORA_FAULT"] = f"accumulation#{count}@{rank}~0={fault}"
    else:
        os.environ["QLORA_FAULT"] = f"first-step#{step + 1}@{rank}~0=slow:{_SLOW_S}"
    try:
        yield
    finally:
        del os.environ["QLORA_FAULT"]


@contextmanager
def _commanded(fault: str, run: RunDir, spec: RunSpec, say: Say) -> Iterator[None]:
    """Have Slurm do the fault once the run is halfway."""
    if fault not in COMMANDS:
        yield
        return
    assert spec.schedule.steps is not None
    half, over = spec.schedule.steps // 2, threading.Event()

    def strike() -> None:
        while not over.wait(_POLL_S):
            if newest_attempt(run) is None or standing(run, spec).last_step < half:
                continue
            for job in live_jobs(run.root):
                done = run_command(*COMMANDS[fault], job)
                say(f"{' '.join((*COMMANDS[fault], job))}: exit {done.returncode} {done.stderr}")
            return

    thread = threading.Thread(target=strike, name="drill", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def report_text(report: Report, fault: str) -> str:
    """A drill's outcome for a person."""
    rows = report.now.attempts
    lost = sum(row.lost_steps for row in rows)
    away = sum(
        later.started_at - (before.ended_at or time.time()) for before, later in pairwise(rows)
    )
    if report.now.state == "done" and not report.met:
        return f"{fault}: this proves nothing, for the run was over before; use more --steps"
    if not report.passed:
        lines = [f"{fault}: the run did NOT come back exactly ({report.now.state})"]
        return "\n".join([*lines, *report.differences])
    return (
        f"{fault}: the run came back exactly: {len(rows)} attempts, {lost} steps taken again, "
        f"{away:.0f} s between them; losses, weights, moments and samples are the unbroken run's, "
        "bit for bit"
    )
