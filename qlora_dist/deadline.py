"""When a job's time is over, and from when on its ranks must be saving."""

import sys
import time

from qlora_dist.beats import Beat
from qlora_dist.diagnosis import clock_s
from qlora_dist.ledger import Measured
from qlora_dist.scheduler import JobView, SchedulerError, show_job

# The limit may be changed while the job runs.
_ASK_EVERY_S = 60.0
# sbatch(1), --signal: the warning may come so much early.
_EARLY_S = 60.0


class Deadline:
    """Follows the end of this job's time.

    Args:
        job: Its id, as scontrol takes it.
        lead_s: How long before it Slurm was asked to warn, in seconds.
    """

    def __init__(self, job: str, lead_s: float) -> None:
        self._job, self._lead_s = job, lead_s
        self._end: float | None = None
        self._asked: float | None = None

    def update(self) -> None:
        """Ask Slurm, if the last answer is old; one that is not answered keeps the last."""
        now = time.monotonic()
        if self._asked is not None and now - self._asked < _ASK_EVERY_S:
            return
        self._asked = now
        try:
            view = show_job(self._job)
        except SchedulerError as error:
            sys.stderr.write(f"{error}\n")
            return
        self._end = view.end_time if view else self._end

    def warned(self, view: JobView | None = None) -> bool:
        """Whether a warning that comes now is that of the limit.

        Args:
            view: What Slurm says now, if it has been asked; else its last answer counts.
        """
        if view is not None:
            self._end = None if view.preempted else view.end_time
        return self._end is not None and self._left() < self._lead_s + _EARLY_S

    def due(self, beats: dict[int, Beat]) -> bool:
        """Whether ranks must be asked to save now, for there may be no warning in time."""
        micro_s = max((beat.micro_s for beat in beats.values()), default=0.0)
        save_s = max((beat.save_s for beat in beats.values()), default=0.0)
        measured = Measured(micro_s, save_s) if save_s else None
        return self._end is not None and self._left() < clock_s(measured)

    def _left(self) -> float:
        assert self._end is not None
        return self._end - time.time()
