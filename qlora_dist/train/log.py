"""What a run says: lines for a person, and metrics for programs. Rank 0 writes both."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_dist.layout import RunDir
from qlora_dist.train.world import World


class _Lines:
    """A file that lines are added to; what the disk refuses is kept, and written later."""

    def __init__(self, path: Path) -> None:
        self._path, self._pending = path, b""

    def add(self, line: str) -> None:
        self._pending += line.encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        if not self._pending:
            return
        with contextlib.suppress(OSError), self._path.open("ab", buffering=0) as file:
            begin = file.seek(0, os.SEEK_END)
            try:
                written = 0
                while written < len(self._pending):
                    written += file.write(self._pending[written:])
            except OSError:
                # No half lines.
                file.truncate(begin)
                raise
            self._pending = b""


class RunLog:
    """Lines for a person, in the attempt's run.log.

    Args:
        run: The run directory.
        attempt: Number of the attempt.
        world: Only rank 0 writes.
        echo: Write to standard error too, where no launcher of ours shows the file.
    """

    def __init__(self, run: RunDir, attempt: int, world: World, *, echo: bool) -> None:
        self._lines = _Lines(run.run_log(attempt)) if world.rank == 0 else None
        self._echo = echo

    def say(self, line: str) -> None:
        """Add a line; nothing on ranks other than 0."""
        if self._lines is None:
            return
        self._lines.add(line)
        if self._echo:
            sys.stderr.write(line + "\n")


class EverySoOften:
    """Passes on a line of progress when the last one is some seconds old.

    Args:
        say: Takes the lines.
        every_s: Seconds between two.
    """

    def __init__(self, say: Callable[[str], None], every_s: float = 10.0) -> None:
        self._say, self._every_s = say, every_s
        self._last = time.monotonic()

    def say(self, line: str) -> None:
        """Pass the line on, or drop it."""
        if time.monotonic() - self._last >= self._every_s:
            self._last = time.monotonic()
            self._say(line)


class Metrics:
    """metrics.jsonl: one JSON object a line, ``kind`` "train" or "eval"; rank 0's.

    Floats are written so that they read back bit for bit.

    Attributes:
        bytes: Length of the file, lines counted that the disk has refused so far.
    """

    def __init__(self, path: Path, world: World, attempt: int) -> None:
        self._path, self._lines, self._attempt = path, _Lines(path), attempt
        self._writes = world.rank == 0
        self.bytes = path.stat().st_size if path.exists() else 0

    def cut(self, length: int) -> None:
        """Forget what came after a checkpoint: cut the file to ``length`` bytes."""
        if self._writes:
            with self._path.open("ab") as file:
                # A file that lost its end (a copied run) is left as it is.
                if file.tell() > length:
                    file.truncate(length)
                    os.fsync(file.fileno())
            self.bytes = self._path.stat().st_size

    def write(self, kind: str, **values: Any) -> None:
        """Add one record."""
        if not self._writes:
            return
        record = {"kind": kind, **values, "attempt": self._attempt, "time": time.time()}
        line = json.dumps(record)
        self.bytes += len(line) + 1
        self._lines.add(line)

    def flush(self) -> None:
        """Try again to write what the disk has refused."""
        self._lines.flush()


def redirect_output(path: Path) -> None:
    """Send everything that this process prints, C++ libraries included, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
