"""What a site will do to a run, as values: made by a backend, printed by the command line."""

import math
from dataclasses import dataclass
from typing import Literal

from qlora_dist.ledger import Measured

Event = Literal[
    "submission",
    "preemption",
    "time limit",
    "node failure",
    "cancel",
    "requeue",
    "processes",
    "status",
    "security",
]

# From a signal's due time to a micro-step that can see it, in seconds; Slurm was up to 0.7 s late.
_NOTICE_S = 1.0
# From the last rank's end to the job's place in the queue, in seconds: measured 3 to 6, most of it
# torchrun's own end.
TEARDOWN_S = 6.0
# What the batch process's own clock adds, and what it takes before a save was measured.
_RESERVE_S, _UNMEASURED_S = 10.0, 75.0


@dataclass(frozen=True)
class Finding:
    """One thing that can happen to a run.

    Attributes:
        event: What happens to it.
        what: What follows, in a sentence or two for a person.
        decided_by: Settings that decide it, such as "KillWait=5".
        can_lose: Completed steps that it can cost at most; None where no step is at stake.
        change: What to change, by whom; empty where nothing is to be gained.
        never_starts: Whether the job would be refused, or wait for ever.
    """

    event: Event
    what: str
    decided_by: tuple[str, ...] = ()
    can_lose: int | None = None
    change: tuple[str, ...] = ()
    never_starts: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found.

    Attributes:
        site: The cluster, its version and the partition, on one line.
        measured: What a stop takes, from the run's newest attempt; None before there is one.
        signal_lead_s: The warning ahead of the time limit that is proposed; None without measured.
        findings: In the order of the events.
        unknown: What could not be read, and nothing is said about.
    """

    site: str
    measured: Measured | None
    signal_lead_s: int | None
    findings: tuple[Finding, ...]
    unknown: tuple[str, ...]


def stop_s(measured: Measured) -> float:
    """Longest time from a signal to the commit of the last complete step, in seconds.

    A save that is being written is waited for before the last one begins.
    """
    return _NOTICE_S + measured.micro_s + 2 * measured.save_s


def lead_s(measured: Measured) -> int:
    """Warning ahead of a time limit that lets a run save and go back into the queue, in seconds."""
    return math.ceil(stop_s(measured) + TEARDOWN_S)


def clock_s(measured: Measured | None) -> float:
    """How long before a time limit the batch process acts without any warning, in seconds."""
    return _UNMEASURED_S if measured is None else lead_s(measured) + _RESERVE_S


def most_lost_steps(every_steps: int, measured: Measured | None, step_s: float | None) -> int:
    """Completed steps that a run can lose when it is ended without a save.

    One save is written while training goes on, and the next begins after it: what is committed is
    at most two save intervals behind, and one interval and the steps of one save where those are
    known.

    Args:
        every_steps: Steps between two saves.
        measured: How long a save takes; None for unknown.
        step_s: How long the shortest step takes, in seconds; None for unknown.
    """
    if measured is None or step_s is None:
        return 2 * every_steps
    return min(2 * every_steps, every_steps + math.ceil(measured.save_s / step_s) + 1)
