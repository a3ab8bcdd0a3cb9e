"""What a person sees of a running attempt: the run's log and its progress, read from its files.

Reading files instead of pipes keeps the terminal free of libraries' chatter (that is in
``attempts/NNN/logs``), and shows the same for a local run and one on a cluster.
"""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_dist.layout import RunDir

# Lines are this far apart where there is no terminal to draw a bar on.
LINE_EVERY_S = 10.0


class Console:
    """Follows one attempt.

    Args:
        run: The run directory.
        attempt: Number of the attempt.
        say: Takes each line.
        bar: Draw a progress bar on standard error instead of progress lines.
    """

    def __init__(self, run: RunDir, attempt: int, say: Callable[[str], None], *, bar: bool) -> None:
        self._log, self._metrics = Tail(run.run_log(attempt)), Tail(run.metrics)
        self._attempt, self._say, self._bar_wanted = attempt, say, bar
        self._bar: Any = None
        self._last_line = 0.0

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self.update()
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()

    def update(self) -> None:
        """Show what has come since the last call, as long as there is a terminal to show it on."""
        with contextlib.suppress(OSError):
            self._update()

    def _update(self) -> None:
        for line in self._log.new_lines():
            self.say(line)
        for text in self._metrics.new_lines():
            # A resume cuts the file back, perhaps in the middle of what was about to be read.
            with contextlib.suppress(ValueError):
                record = json.loads(text)
                if record["attempt"] == self._attempt and record["kind"] == "train":
                    self._show(record)

    def say(self, line: str) -> None:
        """Show a line, above the bar if there is one."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.clear()
        self._say(line)

    def _show(self, record: dict[str, Any]) -> None:
        step, steps = record["step"], record["num_steps"]
        text = (
            f"loss {record['loss']:.4f}, lr {record['lr']:.2e}, {record['tokens_per_s']:,.0f} tok/s"
        )
        if self._bar_wanted:
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=steps, initial=step - 1, unit="step", dynamic_ncols=True)
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.n = step
            self._bar.refresh()
        elif step == steps or time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            left = _duration((steps - step) * record["step_s"])
            self._say(f"step {step}/{steps}, {text}, {left} left")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Tail:
    """New whole lines of a file that grows, may not be there yet, and may be cut back."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def new_lines(self) -> list[str]:
        """Whole lines that have come since the last call."""
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, 2)
                if size < self._offset:
                    self._offset = size
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._offset += len(whole) + len(newline)
        return whole.decode(errors="replace").splitlines()
