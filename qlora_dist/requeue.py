"""What follows an attempt of a job: the one rule by which a run goes back into the queue."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from qlora_dist import ends
from qlora_dist.ends import RankEnd
from qlora_dist.scheduler import JobView, SlurmJob

# "requeued" was Slurm's own doing.
Next = Literal["nothing", "requeue", "requeued", "new job"]

# How many attempts in a row may end in such a way, with no step newly committed in any of them,
# before the run is given up. A run that is stopped before its first step each time would otherwise
# go through the queue for ever.
BUDGETS = {
    ends.FAILED: 6,
    ends.HANG: 4,
    ends.BAD_NODE: 4,
    ends.TIME_LIMIT: 2,
    ends.PREEMPTED: 10,
}
_NAMES = {
    ends.FAILED: "failed",
    ends.HANG: "hung",
    ends.BAD_NODE: "met a bad node",
    ends.TIME_LIMIT: "came to the time limit",
    ends.PREEMPTED: "were preempted",
}
# After the second failure in a row the job waits so long, then four times as long each time: a file
# system may come back.
_BACK_OFF_S, _LONGEST_S = 60.0, 1800.0


@dataclass(frozen=True)
class Decision:
    """What follows.

    Attributes:
        following: What to do.
        why: The same for a person.
        wait_s: How long the job is to wait at least, in seconds.
        exclude: Nodes that it is to leave out.
    """

    following: Next
    why: str
    wait_s: float = 0.0
    exclude: Sequence[str] = field(default=())


def decide(
    end: RankEnd,
    job: SlurmJob,
    view: JobView | None,
    *,
    idle: Sequence[int],
    cancelled: bool = False,
) -> Decision:
    """Decide what follows an attempt.

    Args:
        end: How it ended.
        job: This execution.
        view: The job as Slurm shows it now; None if Slurm does not answer.
        idle: Codes of the attempts in a row, this one first, since a step was last committed.
        cancelled: Whether `qlora cancel` was called.
    """
    if end.code in (ends.DONE, ends.USER_ERROR, ends.NEVER_RESTART):
        return Decision("nothing", "a restart would change nothing")
    if cancelled:
        # An execution that Slurm has started by itself finds the same, and ends.
        return Decision("nothing", "it was cancelled")
    if view is not None and view.restarts != job.restart:
        return Decision("requeued", "Slurm has requeued it already")
    if view is not None and _was_cancelled(view):
        return Decision("nothing", "it was cancelled")
    if why := given_up(idle):
        return Decision("nothing", why)
    cause = end.code if end.code in BUDGETS else ends.FAILED
    count, wait_s = _counts(idle)[cause], 0.0
    if cause in (ends.FAILED, ends.HANG) and count > 1:
        wait_s = min(_LONGEST_S, _BACK_OFF_S * 4 ** (count - 2))
    if view is not None and not view.requeue:
        return Decision("new job", "this job may not be requeued", wait_s)
    return Decision("requeue", "it goes on from its last committed step", wait_s)


def given_up(idle: Sequence[int]) -> str:
    """Why a run is not to be tried again; empty while it is.

    Args:
        idle: Codes of the attempts in a row since a step was last committed.
    """
    for cause, count in _counts(idle).items():
        if count >= BUDGETS[cause]:
            return f"{count} attempts {_NAMES[cause]} and no step was committed since the first"
    return ""


def _counts(idle: Sequence[int]) -> Counter[int]:
    return Counter(code if code in BUDGETS else ends.FAILED for code in idle)


def _was_cancelled(view: JobView) -> bool:
    """Whether somebody has ended the job, and neither its time nor a job of more weight."""
    return view.state == "COMPLETING" and view.reason != "TimeLimit" and not view.preempted
