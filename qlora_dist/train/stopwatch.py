"""How long a start takes, stage by stage."""

import time


class Stopwatch:
    """How long the stages of a start took, from the process's first line to its first step."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._laps: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """A stage has ended."""
        now = time.monotonic()
        self._laps[stage], self._last = now - self._last, now

    def __str__(self) -> str:
        parts = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self._laps.items())
        return f"{sum(self._laps.values()):.1f} s ({parts})"
