"""What a process says of itself while it works; imports no torch, so that it begins before."""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from qlora_dist.beats import Beat
from qlora_dist.ranks import DUMP_SIGNAL

_EVERY_S = 10.0
# A process that the kernel has told of its parent's end saves and goes; this is for one that hangs.
_ORPHAN_S = 120.0


class Pulse:
    """Where this process is.

    The main thread sets attributes, which costs it nothing; a thread writes them down. Without
    :meth:`start` nothing is written.
    """

    def __init__(self) -> None:
        self._count, self._stage, self._waits = 0, "start", False
        self._step, self._micro_s, self._save_s = 0, 0.0, 0.0
        self._warm = False
        # Seconds between two beats.
        self.every_s = _EVERY_S

    def start(self, path: Path) -> None:
        """Write beats from now on, and stacks into standard error on ``DUMP_SIGNAL``.

        Args:
            path: The file that takes the beats; its folder is there.
        """
        faulthandler.register(DUMP_SIGNAL, file=sys.stderr, all_threads=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        self._write(fd)
        threading.Thread(target=self._beat, args=(fd,), name="pulse", daemon=True).start()

    def at(self, stage: str, step: int | None = None) -> None:
        """Come to a stage, or get on in it."""
        self._stage, self._count = stage, self._count + 1
        if step is not None:
            self._step = step

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for other ranks for the length of a ``with`` block."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
            self._count += 1

    def took(self, *, micro_s: float = 0.0, save_s: float = 0.0) -> None:
        """Keep the longest of what was measured.

        The first step's micro-batches do not count: they compile, and take the memory.
        """
        if micro_s and not self._warm:
            self._warm = True
            return
        self._micro_s, self._save_s = max(self._micro_s, micro_s), max(self._save_s, save_s)

    def _write(self, fd: int) -> None:
        beat = Beat(
            count=self._count,
            stage=self._stage,
            waits=self._waits,
            step=self._step,
            micro_s=round(self._micro_s, 4),
            save_s=round(self._save_s, 4),
            time=round(time.time(), 1),
        )
        # One write of one length, in place: no name on a shared disk changes.
        with contextlib.suppress(OSError):
            os.pwrite(fd, json.dumps(asdict(beat)).ljust(256).encode("ascii"), 0)

    def _beat(self, fd: int) -> None:
        parent, count, moved = os.getppid(), self._count, time.monotonic()
        written = time.monotonic()
        while True:
            time.sleep(min(1.0, self.every_s))
            if time.monotonic() - written >= self.every_s:
                written = time.monotonic()
                self._write(fd)
            if self._count != count or os.getppid() == parent:
                count, moved = self._count, time.monotonic()
            elif time.monotonic() - moved > _ORPHAN_S:
                os._exit(1)
