"""Requests to a running attempt: files in ``control/``, which the processes of every node poll.

::

    stop-000   save and end; holds the code to end with (qlora_dist.ends)
    kill-000   nothing moves any more: write down where every rank is, then kill it; holds why
    cancel     the run is not to be started again by itself
"""

import contextlib
import os
from pathlib import Path

from qlora_dist import ends
from qlora_dist.layout import RunDir


def ask_to_stop(run: RunDir, attempt: int, code: int = ends.PREEMPTED) -> None:
    """Ask every rank to save and end; the first cause that is given stands.

    Safe in a signal handler. A disk that refuses the file is not an error: signals ask too.
    """
    _create(run.stop_file(attempt), str(code))


def stop_code(stop_file: Path) -> int:
    """The code that a stop asks the ranks to end with."""
    try:
        return int(stop_file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return ends.PREEMPTED


def ask_to_kill(run: RunDir, attempt: int, why: str) -> None:
    """Have each node write down the stacks of its ranks, and kill them."""
    _create(run.kill_file(attempt), why)


def _create(path: Path, text: str) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
