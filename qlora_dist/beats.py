"""Signs of life: what each rank writes beside its work, and who finds that nothing moves.

A rank's file ``attempts/NNN/beats/RRRRR.json`` says where it is. Time is measured by the watcher's
own clock alone, from the last change that it has seen.
"""

import json
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qlora_dist.layout import RunDir

# A watcher that was not woken for so long was suspended.
_STOPPED_S = 30.0


@dataclass(frozen=True)
class Beat:
    """Where a rank is.

    Attributes:
        count: Places that it has come to; grows as long as it gets on.
        stage: Such as "load" or "training".
        waits: Whether it waits there for other ranks.
        step: Steps that are complete.
        micro_s: Seconds of a micro-batch, forward and backward, in the slowest step but the first.
        save_s: Seconds from the longest save's begin to its commit; 0 before the first.
        time: Seconds since the epoch, by the rank's clock; for people.
    """

    count: int = 0
    stage: str = "start"
    waits: bool = False
    step: int = 0
    micro_s: float = 0.0
    save_s: float = 0.0
    time: float = 0.0


def read_beats(run: RunDir, attempt: int) -> dict[int, Beat]:
    """Newest beats of an attempt, by rank; not of ranks that have not begun, or are writing."""
    found = {}
    for path in run.beats(attempt).glob("*.json"):
        beat = _read(path)
        if beat is not None:
            found[int(path.stem)] = beat
    return found


def _read(path: Path) -> Beat | None:
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="ascii"))
        return Beat(**{field.name: tree[field.name] for field in fields(Beat)})
    except (OSError, ValueError, KeyError):
        return None


class Watch:
    """Finds an attempt in which nothing has moved for too long.

    Args:
        run: The run directory.
        attempt: Number of the attempt.
        world_size: Ranks that it has.
        limit_s: How long a rank may stay where it is, in seconds.
    """

    def __init__(self, run: RunDir, attempt: int, *, world_size: int, limit_s: float) -> None:
        self._run, self._attempt = run, attempt
        self._world_size, self._limit_s = world_size, limit_s
        self.beats: dict[int, Beat] = {}
        self._moved = self._looked = time.monotonic()
        # Reading a file a rank costs a shared disk something.
        self._every_s = min(10.0, limit_s / 5)

    def hung(self) -> str | None:
        """Why the attempt is taken for hung, for a person; None while it is not.

        One rank that gets on is enough: the others may well wait for it, for hours while it
        tokenises.
        """
        now = time.monotonic()
        if now - self._looked < self._every_s:
            return None
        if now - self._looked > self._every_s + _STOPPED_S:
            # This process was stopped itself, perhaps its whole job: nothing was seen meanwhile.
            self._moved = now
        self._looked = now
        beats = self.beats | read_beats(self._run, self._attempt)
        if any(beats[r].count != getattr(self.beats.get(r), "count", None) for r in beats):
            self._moved = now
        self.beats = beats
        if now - self._moved < self._limit_s:
            return None
        return self._explain()

    def _explain(self) -> str:
        seconds = f"{self._limit_s:.0f} s"
        missing = [rank for rank in range(self._world_size) if rank not in self.beats]
        stuck = [rank for rank in sorted(self.beats) if not self.beats[rank].waits]
        waiting = [rank for rank in sorted(self.beats) if self.beats[rank].waits]
        if missing:
            text = f"nothing has moved for {seconds}: {_ranks(missing)} never started"
        elif stuck:
            beat = self.beats[stuck[0]]
            text = (
                f"nothing has moved for {seconds}: {_ranks(stuck)} in {beat.stage}, after step "
                f"{beat.step}"
            )
        else:
            text = f"nothing has moved for {seconds}: every rank waits for another"
        if waiting and (missing or stuck):
            text += f"; {_ranks(waiting)} waiting"
        return text


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
