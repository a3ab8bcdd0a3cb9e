"""Processes of this machine: telling one from another, their ends. Linux only."""

import contextlib
import ctypes
import os
import platform
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

# All that ask a run to save and end: from a user, a terminal that closes, or a scheduler.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


@dataclass(frozen=True)
class Process:
    """A process, told apart from every other that had or will have its pid."""

    host: str
    boot_id: str
    pid: int
    start_ticks: int

    @classmethod
    def this(cls) -> "Process":
        """The calling process."""
        ticks = start_ticks(os.getpid())
        assert ticks is not None
        return cls(platform.node(), _boot_id(), os.getpid(), ticks)

    def is_gone(self) -> bool | None:
        """Whether it has ended; None where that cannot be told from this machine."""
        if self.host != platform.node():
            return None
        return self.boot_id != _boot_id() or start_ticks(self.pid) != self.start_ticks


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def start_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (proc(5)), in clock ticks after boot; None for no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is a name in parentheses that may itself hold spaces and parentheses.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def leave(code: int) -> NoReturn:
    """End the calling process at once, when all that it printed is written.

    For processes that were in a process group. A thread of gloo lets go of its last tensors some
    time after the collective has ended, and ``destroy_process_group`` does not wait for it while
    anything refers to the group, as FSDP2 does. If the interpreter is going down by then, the
    process aborts (pytorch/pytorch#190489), and a rank that did all its work is seen to fail.
    """
    for stream in (sys.stdout, sys.stderr):
        # It may be a file on a disk that is full.
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def die_with_parent() -> None:
    """Ask the kernel for a SIGTERM when the parent process ends (prctl(2))."""
    _at_parents_death(signal.SIGTERM)


def be_killed_with_parent() -> None:
    """The same with SIGKILL, for a program that ignores SIGTERM."""
    _at_parents_death(signal.SIGKILL)


def _at_parents_death(number: signal.Signals) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
