"""The ranks of an attempt on this machine: who lives, and how those end that say nothing."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_dist.ends import write_silent_end
from qlora_dist.files import write_json
from qlora_dist.layout import RunDir
from qlora_dist.process import Process

# Makes a rank write the stacks of all its threads into its log (qlora_dist.train.pulse).
DUMP_SIGNAL = signal.SIGQUIT
# From asking for stacks to the kill.
_DUMP_S = 2.0


def register_rank(path: Path) -> None:
    """Say that a rank runs; its end replaces this (:func:`qlora_dist.ends.write_rank_end`)."""
    write_json(path, {"process": asdict(Process.this())})


def live_ranks(run: RunDir, attempt: int, ranks: Iterable[int] | None = None) -> list[Process]:
    """Processes of an attempt that run on this machine.

    Args:
        run: The run directory.
        attempt: Number of the attempt.
        ranks: Global ranks to look at; None for all.
    """
    alive = []
    for _, tree in _files(run, attempt, ranks):
        if "process" in tree:
            process = Process(**tree["process"])
            if process.is_gone() is False:
                alive.append(process)
    return alive


def end_ranks(run: RunDir, attempt: int, ranks: Iterable[int] | None, *, after_s: float) -> None:
    """Wait for ranks on this machine, and kill those that are still there after that long."""
    ranks = None if ranks is None else list(ranks)
    deadline = time.monotonic() + after_s
    while alive := live_ranks(run, attempt, ranks):
        if time.monotonic() >= deadline:
            _signal(alive, signal.SIGKILL)
            return
        time.sleep(0.1)


def dump_and_kill(run: RunDir, attempt: int, ranks: Iterable[int]) -> None:
    """Have ranks on this machine write their stacks into their logs, then kill them."""
    ranks = list(ranks)
    _signal(live_ranks(run, attempt, ranks), DUMP_SIGNAL)
    time.sleep(_DUMP_S)
    _signal(live_ranks(run, attempt, ranks), signal.SIGKILL)


def mark_silent(run: RunDir, attempt: int, ranks: Iterable[int], *, node: str = "") -> None:
    """Say for ranks that have ended without a word that they have."""
    ranks = list(ranks)
    said = {rank for rank, tree in _files(run, attempt, ranks) if "code" in tree}
    for rank in ranks:
        if rank not in said:
            with contextlib.suppress(OSError):
                write_silent_end(run.rank_file(attempt, rank), rank=rank, node=node)


def _files(
    run: RunDir, attempt: int, ranks: Iterable[int] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    folder = run.attempt(attempt) / "ranks"
    paths = folder.glob("*.json") if ranks is None else (run.rank_file(attempt, r) for r in ranks)
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            tree = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(tree, dict):
                yield int(path.stem), tree


def _signal(processes: Iterable[Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
