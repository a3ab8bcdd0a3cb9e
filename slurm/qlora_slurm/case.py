"""One run on one site: what every rule of the doctor looks at, and the arithmetic they share."""

import math
from dataclasses import dataclass

from qlora_dist.diagnosis import lead_s, most_lost_steps, stop_s
from qlora_dist.ledger import Measured
from qlora_dist.plan import Plan
from qlora_slurm.script import time_limit_min
from qlora_slurm.site_facts import Partition, Site
from qlora_slurm.site_profile import Profile

# No shorter save interval is proposed, in steps.
_LEAST_EVERY = 10


@dataclass(frozen=True)
class Case:
    """A run, as it would be submitted here.

    Attributes:
        measured: What a stop of it takes; None before it has run.
        step_s: Its shortest step, in seconds; None before.
    """

    site: Site
    plan: Plan
    profile: Profile
    measured: Measured | None = None
    step_s: float | None = None

    @property
    def every_steps(self) -> int:
        """Steps between two saves."""
        return self.plan.spec.checkpoint.every_steps

    @property
    def time_s(self) -> int:
        """Time limit that the job asks for."""
        return 60 * time_limit_min(self.plan, self.profile)

    @property
    def most_lost(self) -> int:
        """Completed steps that an end without a save can cost."""
        lost = most_lost_steps(self.every_steps, self.measured, self.step_s)
        return min(lost, self.plan.length.steps or lost)

    def kill_wait(self) -> tuple[float | None, str]:
        """KillWait, and how it is written."""
        seconds = self.site.config.kill_wait_s
        return seconds, f"KillWait={number(seconds)}"

    def can_lose(self, window_s: float | None) -> int:
        """Completed steps that a stop with so many seconds can cost at most."""
        if self.measured is None or window_s is None:
            return self.most_lost
        return 0 if stop_s(self.measured) <= window_s else self.most_lost

    def verdict(self, window_s: float | None) -> str:
        """The same in words."""
        if window_s is None:
            return "How long it has to save is not known."
        window = f"{number(window_s)} s"
        if self.measured is None:
            return f"It has {window} for a stop; nothing is lost if that is enough."
        need = f"{stop_s(self.measured):.1f} s"
        if stop_s(self.measured) <= window_s:
            return f"It has {window} for a stop, which takes up to {need}: nothing is lost."
        return (
            f"It has {window} for a stop, which takes up to {need}: what is after the last "
            "committed step can be lost."
        )

    def save_oftener(self) -> tuple[str, ...]:
        """Advice on checkpoint.every_steps, where it can be given."""
        if self.measured is None or self.step_s is None:
            return (f"a lower checkpoint.every_steps than {self.every_steps} loses less",)
        # Saves that follow one another too closely make training wait.
        least = max(_LEAST_EVERY, math.ceil(2 * self.measured.save_s / self.step_s))
        if least >= self.every_steps:
            return ()
        lost = most_lost_steps(least, self.measured, self.step_s)
        return (
            f"checkpoint.every_steps={least} instead of {self.every_steps} loses {lost} steps at "
            "most, and a save still takes less than half of the time between two",
        )

    def proposed_lead_s(self) -> int | None:
        """Warning ahead of the time limit that would do; None before it can be said."""
        return None if self.measured is None else lead_s(self.measured)

    def rivals(self, partition: Partition) -> list[str]:
        """Partitions of a higher priority tier that share a node with it."""
        at: dict[str, set[str]] = {}
        for node in self.site.nodes:
            at.setdefault(node.partition, set()).add(node.name)
        mine = at.get(partition.name, set())
        return [
            each.name
            for each in (*self.site.partitions, *self.site.others)
            # Without sinfo's word none is ruled out.
            if each.tier > partition.tier
            and (not self.site.nodes or mine & at.get(each.name, set()))
        ]


def number(value: float | None) -> str:
    """Seconds or a count, as Slurm would write them."""
    if value is None:
        return "unknown"
    return "UNLIMITED" if math.isinf(value) else f"{value:g}"


def duration(seconds: float) -> str:
    """A duration as resources.time has it."""
    if math.isinf(seconds):
        return "UNLIMITED"
    minutes, rest = divmod(int(seconds), 60)
    days, minutes = divmod(minutes, 1440)
    text = f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
    return f"{days}-{text}" if days else text
