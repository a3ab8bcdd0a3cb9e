"""One attempt of a run on one machine: start torchrun, pass on what it says, report the end.

A stop (SIGTERM, SIGINT, SIGHUP) becomes a file that the ranks poll; torchrun itself is left alone,
so that it neither kills ranks in the middle of a save nor fills the terminal with its traceback.
A second signal is passed on to torchrun, a third kills it.
"""

import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qlora_dist.attempt import own
from qlora_dist.console import Console
from qlora_dist.ends import RankEnd, read_rank_ends, worst
from qlora_dist.layout import RunDir
from qlora_dist.process import die_with_parent

_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run_attempt(run: RunDir, *, say: Callable[[str], None], progress: bool) -> RankEnd:
    """Run the next attempt to its end.

    Args:
        run: The run directory; its command.json says what to start.
        say: Takes each line that a person should see.
        progress: Draw a progress bar on standard error.

    Returns:
        The end that decides for all ranks.

    Raises:
        RunDirError: Another launcher has the run.
    """
    command = json.loads(run.command_json.read_text(encoding="utf-8"))
    with own(run) as attempt:
        process = _start(run, attempt, command["args"], command["env"])
        with (
            _Stops(run, attempt, process, say),
            Console(run, attempt, say, bar=progress) as console,
        ):
            while True:
                try:
                    process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    console.update()
                else:
                    break
        ends = read_rank_ends(run.attempt(attempt) / "ranks", world_size=command["world_size"])
        return worst(ends)


def _start(
    run: RunDir, attempt: int, args: Sequence[str], env: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start torchrun in a session of its own: a terminal's Ctrl-C is for the launcher."""
    log = run.launcher_log(attempt).open("wb")
    with log:
        return subprocess.Popen(
            [sys.executable, *args, str(run.root)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_parent,
            env=os.environ | dict(env) | {"QLORA_ATTEMPT": str(attempt)},
        )


class _Stops:
    """Signals to the launcher while an attempt runs."""

    def __init__(
        self,
        run: RunDir,
        attempt: int,
        process: subprocess.Popen[bytes],
        say: Callable[[str], None],
    ) -> None:
        self._stop_file: Path = run.stop_file(attempt)
        self._process, self._say = process, say
        self._count = 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> None:
        for number in _STOPS:
            self._before[number] = signal.signal(number, self._on_signal)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, _frame: types.FrameType | None) -> None:
        self._count += 1
        name = signal.Signals(number).name
        if self._count == 1:
            self._stop_file.touch(mode=0o600)
            self._say(f"{name}: saving after this step, then stopping")
        elif self._count == 2:
            self._process.send_signal(signal.SIGTERM)
            self._say(f"{name} again: telling torchrun to stop")
        else:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._say(f"{name} a third time: killed")
