"""One attempt of a run in the foreground: on this machine, or on the nodes of an allocation.

A signal that asks for a stop becomes a file that the ranks poll; torchrun itself is left alone,
so that it neither kills ranks in the middle of a save nor fills the terminal with its traceback.
A third signal kills every rank.
"""

import json
import os
import signal
import types
from collections.abc import Callable

from qlora_dist.attempt import own
from qlora_dist.beats import Watch
from qlora_dist.console import Console
from qlora_dist.control import ask_to_kill, ask_to_stop
from qlora_dist.ends import RankEnd, hang_end, read_rank_ends, worst
from qlora_dist.layout import RunDir
from qlora_dist.ledger import note_end
from qlora_dist.process import STOP_SIGNALS
from qlora_dist.process_env import note_env, process_env
from qlora_dist.torchrun import ALONE, attend, start_torchrun

# Runs an attempt's ranks to their end, and calls what it is given about once a second or oftener.
Ranks = Callable[[RunDir, int, Callable[[], None]], RankEnd]


def run_attempt(run: RunDir, ranks: Ranks, *, say: Callable[[str], None], bar: bool) -> RankEnd:
    """Run the next attempt to its end.

    Args:
        run: The run directory.
        ranks: Where the ranks run.
        say: Takes each line that a person should see; must not raise.
        bar: Draw a progress bar on standard error.

    Returns:
        The end that decides for all ranks.

    Raises:
        RunDirError: Another launcher has the run.
        PlanError: The run directory's name cannot be on Python's path.
    """
    with own(run) as attempt:
        with _Stops(run, attempt) as stops, Console(run, attempt, say, bar=bar) as console:

            def tick() -> None:
                stops.tell(console.say)
                console.update()

            end = ranks(run, attempt, tick)
            stops.tell(console.say)
        note_end(run, attempt, end)
        return end


def ranks_here(run: RunDir, attempt: int, tick: Callable[[], None]) -> RankEnd:
    """Run all ranks of an attempt on this machine."""
    command = json.loads(run.command_json.read_text(encoding="utf-8"))
    world_size, hangs = command["world_size"], list[RankEnd]()
    watch = Watch(run, attempt, world_size=world_size, limit_s=command["timeout_s"])

    def look() -> None:
        tick()
        if not hangs and (why := watch.hung()):
            hangs.append(hang_end(why))
            ask_to_kill(run, attempt, why)

    env = process_env(run, attempt, os.environ)
    note_env(run, attempt, os.environ, env)
    process = start_torchrun(run, ALONE, run.launcher_log(attempt), env)
    attend(process, run, attempt, range(world_size), tick=look)
    return worst([*read_rank_ends(run.attempt(attempt) / "ranks", world_size=world_size), *hangs])


class _Stops:
    """Signals to the launcher while an attempt runs.

    The handler asks for the stop at once and does nothing that could fail; the rest, and saying so,
    is left to the loop.
    """

    def __init__(self, run: RunDir, attempt: int) -> None:
        self._run, self._attempt = run, attempt
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
        ask_to_stop(self._run, self._attempt)

    def tell(self, say: Callable[[str], None]) -> None:
        """Act on the signals that have come, and say so."""
        for name in self._received[self._told :]:
            self._told += 1
            if self._told == 1:
                say(f"{name}: stopping, with every complete step saved")
            elif self._told == 2:
                say(f"{name} again: still saving; a third one kills every process")
            else:
                ask_to_kill(self._run, self._attempt, f"{name}, for the third time")
                say(f"{name} a third time: killing")
