"""How a run can end, and how that travels from each rank to whoever decides what follows.

torchrun turns every worker's exit code into its own, so a rank says how it ended in a file, and the
launcher reads all of them.
"""

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from qlora_dist.files import write_json

DONE = 0
FAILED = 1
USER_ERROR = 2
PREEMPTED = 85
TIME_LIMIT = 86
HANG = 87
BAD_NODE = 88
NEVER_RESTART = 93

# Ends that every rank comes to together; after any other, the ranks that go on wait for nobody.
AGREED = (DONE, PREEMPTED, TIME_LIMIT)

# First wins when the ranks disagree; a code that is not listed counts as FAILED.
_WORST_FIRST = (
    NEVER_RESTART,
    USER_ERROR,
    BAD_NODE,
    HANG,
    FAILED,
    TIME_LIMIT,
    PREEMPTED,
    DONE,
)

# The time of an end that nobody saw: after every other.
NEVER = float("inf")
# The cause of a rank that left no file: killed, or crashed outside Python.
_KILLED = "killed, or crashed outside Python"
SILENT = f"ended without a word: {_KILLED}"
# How gloo and NCCL say that another rank is no more.
_LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended.

    Attributes:
        rank: Global rank.
        code: One of the codes above.
        cause: One message for a person.
        step: Steps that were complete.
        time: Seconds since the epoch; the first failure is usually the cause of the others.
        node: Where it ran, by Slurm's name for it; empty outside Slurm.
    """

    rank: int
    code: int
    cause: str
    step: int
    time: float
    node: str = ""


def write_rank_end(
    path: Path, *, rank: int, code: int, cause: str, step: int, node: str = ""
) -> None:
    """Say how a rank ended; atomic, so that a reader sees all of it or nothing."""
    write_json(path, asdict(RankEnd(rank, code, cause, step, time.time(), node)))


def write_silent_end(path: Path, *, rank: int, node: str) -> None:
    """Say it for a rank that did not; never taken for the first failure, whose time it lacks."""
    write_json(path, asdict(RankEnd(rank, FAILED, SILENT, 0, NEVER, node)))


def hang_end(why: str) -> RankEnd:
    """The end that decides where nothing moved any more; whoever watched says it, not a rank."""
    return RankEnd(0, HANG, why, 0, time.time())


def read_rank_ends(folder: Path, *, world_size: int) -> list[RankEnd]:
    """Ends of all ranks; a rank that left none counts as a failure."""
    ends = []
    for rank in range(world_size):
        path = folder / f"{rank:05d}.json"
        try:
            ends.append(RankEnd(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            ends.append(RankEnd(rank, FAILED, SILENT, 0, NEVER))
    return ends


def read_said_ends(folder: Path) -> list[RankEnd]:
    """Ends of the ranks that have said how they ended."""
    ends = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            ends.append(RankEnd(**json.loads(path.read_text(encoding="utf-8"))))
    return ends


def all_ended(folder: Path, *, world_size: int) -> bool:
    """Whether every rank has said how it ended."""
    return len(read_said_ends(folder)) == world_size


def worst(ends: Sequence[RankEnd]) -> RankEnd:
    """The end that decides for all: the worst code, and of those the earliest."""

    def order(end: RankEnd) -> tuple[int, float]:
        code = end.code if end.code in _WORST_FIRST else FAILED
        return _WORST_FIRST.index(code), end.time

    first = min(ends, key=order)
    silent = [end.rank for end in ends if end.cause == SILENT]
    if silent and any(text in first.cause for text in _LOST):
        # What the others see of a rank that was killed; it could not say so itself.
        ranks = ", ".join(map(str, silent[:8]))
        return replace(first, cause=f"{first.cause}; no word from rank {ranks}: {_KILLED}")
    return first
