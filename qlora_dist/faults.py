"""Real faults at chosen moments of a run, to show that it survives them.

``QLORA_FAULT=MOMENT[#COUNT][@RANK][~ATTEMPT]=KIND`` makes one process meet one fault, at the
COUNT-th time (1) that it comes to a moment, on rank RANK (0), in one attempt or in each. What
happens then is real: a signal to the own process, an exception, a disk that is filled to its last
byte, a process that stays where it is. ``slow:SECONDS`` stands for storage that is slow from then
on. Nothing happens without the variable.
"""

import contextlib
import os
import re
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

# In the order in which a run comes to them.
MOMENTS = (
    "start",
    "tokenising",
    "load",
    "quantising",
    "loading",
    "first-step",
    "accumulation",
    "save-begin",
    "save-write",
    "save-manifest",
    "save-rename",
    "save-after",
    "evaluation",
    "epoch-end",
    "consolidation",
)
KINDS = ("sigterm", "sigkill", "exception", "full-disk", "hang")
BALLAST = "ballast"
_PATTERN = re.compile(
    rf"^({'|'.join(MOMENTS)})(?:#(\d+))?(?:@(\d+))?(?:~(\d+))?="
    rf"(?:({'|'.join(KINDS)})|slow:(\d+))$"
)


class InjectedError(Exception):
    """Stands for a mistake in somebody's code."""


@dataclass
class _Fault:
    moment: str
    count: int
    kind: str | None
    slow_s: int
    disk: Path
    lock: threading.Lock = field(default_factory=threading.Lock)


_armed: _Fault | None = None


def arm(text: str | None, *, rank: int, attempt: int, disk: Path) -> None:
    """Prepare this process for the fault that QLORA_FAULT names, if it is the one that meets it.

    Args:
        text: The variable's value; None if it is not set.
        rank: Of this process.
        attempt: That this process is of.
        disk: Folder whose file system "full-disk" fills.

    Raises:
        ValueError: The text names no known moment or kind.
    """
    global _armed
    if text is None:
        return
    match = _PATTERN.match(text)
    if match is None:
        raise ValueError(
            f"QLORA_FAULT={text!r}: wanted MOMENT[#COUNT][@RANK][~ATTEMPT]=KIND, with a moment of "
            f"{', '.join(MOMENTS)} and a kind of {', '.join(KINDS)}, slow:SECONDS"
        )
    if int(match[3] or 0) == rank and int(match[4] or attempt) == attempt:
        _armed = _Fault(match[1], int(match[2] or 1), match[5], int(match[6] or 0), disk)


def reach(moment: str) -> None:
    """Say that the run has come to a moment.

    Raises:
        InjectedError: It is the moment of an exception.
    """
    fault = _armed
    if fault is None or fault.moment != moment:
        return
    with fault.lock:
        fault.count -= 1
        left = fault.count
    if fault.kind is None and left <= 0:
        time.sleep(fault.slow_s)
    elif left == 0:
        _strike(fault, moment)


def _strike(fault: _Fault, moment: str) -> None:
    if fault.kind == "exception":
        raise InjectedError(f"injected at {moment}")
    if fault.kind == "full-disk":
        fill(fault.disk)
    elif fault.kind == "hang":
        threading.Event().wait()
    else:
        os.kill(os.getpid(), signal.SIGTERM if fault.kind == "sigterm" else signal.SIGKILL)


def fill(folder: Path) -> None:
    """Take every byte that the folder's file system has left, with a file in it."""
    with (folder / BALLAST).open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size):
                    pass
