"""One attempt of a run on one machine: start torchrun, pass on what it says, report the end.

A signal that asks for a stop becomes a file that the ranks poll; torchrun itself is left alone,
so that it neither kills ranks in the middle of a save nor fills the terminal with its traceback.
A second signal is passed on to torchrun, a third kills it and every rank.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
import types
from collections.abc import Callable
from dataclasses import asdict

from qlora_dist.attempt import kill_ranks, note, own
from qlora_dist.checkpoints import newest_step
from qlora_dist.console import Console
from qlora_dist.ends import RankEnd, read_rank_ends, worst
from qlora_dist.layout import RunDir
from qlora_dist.ledger import last_step
from qlora_dist.process import STOP_SIGNALS
from qlora_dist.torchrun import ALONE, note_env, process_env, start_torchrun

# Ranks whose torchrun is gone notice at their next micro-batch, save and end; then they are killed.
_LAST_SAVE_S = 30.0


def run_attempt(run: RunDir, *, say: Callable[[str], None], progress: bool) -> RankEnd:
    """Run the next attempt to its end.

    Args:
        run: The run directory; its command.json says what to start.
        say: Takes each line that a person should see; must not raise.
        progress: Draw a progress bar on standard error.

    Returns:
        The end that decides for all ranks.

    Raises:
        RunDirError: Another launcher has the run.
        PlanError: The run directory's name cannot be on Python's path.
    """
    command = json.loads(run.command_json.read_text(encoding="utf-8"))
    with own(run) as attempt:
        env = process_env(run, attempt, os.environ, {})
        note_env(run, attempt, os.environ, env)
        process = start_torchrun(run, ALONE, run.launcher_log(attempt), env)
        with (
            _Stops(run, attempt, process) as stops,
            Console(run, attempt, say, bar=progress) as console,
        ):
            while process.poll() is None:
                stops.tell(console.say)
                console.update()
                time.sleep(0.2)
            stops.tell(console.say)
        # Ranks lead sessions of their own, and can outlive a torchrun that was killed.
        kill_ranks(run, attempt, after_s=_LAST_SAVE_S)
        ends = read_rank_ends(run.attempt(attempt) / "ranks", world_size=command["world_size"])
        end = worst(ends)
        note(
            run,
            attempt,
            ended_at=time.time(),
            end=asdict(end),
            last_step=last_step(run, attempt),
            committed_step=newest_step(run.checkpoints),
        )
        return end


class _Stops:
    """Signals to the launcher while an attempt runs.

    The handler asks for the stop at once and does nothing that could fail; the rest, and saying so,
    is left to the loop.
    """

    def __init__(self, run: RunDir, attempt: int, process: subprocess.Popen[bytes]) -> None:
        self._run, self._attempt, self._process = run, attempt, process
        self._received: list[str] = []
        self._told = 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "_Stops":
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, _frame: types.FrameType | None) -> None:
        self._received.append(signal.Signals(number).name)
        with contextlib.suppress(OSError):
            self._run.stop_file(self._attempt).touch(mode=0o600)

    def tell(self, say: Callable[[str], None]) -> None:
        """Act on the signals that have come, and say so."""
        for name in self._received[self._told :]:
            self._told += 1
            if self._told == 1:
                say(f"{name}: stopping, with every complete step saved")
            elif self._told == 2:
                self._process.send_signal(signal.SIGTERM)
                say(f"{name} again: telling torchrun to stop")
            else:
                kill_ranks(self._run, self._attempt, after_s=0.0)
                self._process.kill()
                say(f"{name} a third time: killed")
