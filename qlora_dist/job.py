"""One attempt of a run on one machine: start torchrun, pass on what it says, report the end.

A signal that asks for a stop becomes a file that the ranks poll; torchrun itself is left alone,
so that it neither kills ranks in the middle of a save nor fills the terminal with its traceback.
A second signal is passed on to torchrun, a third kills it and every rank.
"""

import json
import signal
import subprocess
import time
import types
from collections.abc import Callable
from dataclasses import asdict

from qlora_dist.attempt import note, own
from qlora_dist.beats import Watch
from qlora_dist.checkpoints import newest_step
from qlora_dist.console import Console
from qlora_dist.control import ask_to_kill, ask_to_stop
from qlora_dist.ends import RankEnd, hang_end, read_rank_ends, worst
from qlora_dist.layout import RunDir
from qlora_dist.ledger import last_step
from qlora_dist.process import STOP_SIGNALS
from qlora_dist.ranks import end_ranks
from qlora_dist.torchrun import ALONE, attend, start_torchrun


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
    """
    command = json.loads(run.command_json.read_text(encoding="utf-8"))
    world_size = command["world_size"]
    hangs: list[RankEnd] = []
    with own(run) as attempt:
        watch = Watch(run, attempt, world_size=world_size, limit_s=command["timeout_s"])
        process = start_torchrun(run, attempt, ALONE, run.launcher_log(attempt))
        with (
            _Stops(run, attempt, process) as stops,
            Console(run, attempt, say, bar=progress) as console,
        ):

            def tick() -> None:
                stops.tell(console.say)
                console.update()
                if not hangs and (why := watch.hung()):
                    console.say(f"{why}; their stacks go into attempts/{attempt:03d}/logs")
                    hangs.append(hang_end(why))
                    ask_to_kill(run, attempt, why)

            attend(process, run, attempt, range(world_size), tick=tick)
            stops.tell(console.say)
        ends = read_rank_ends(run.attempt(attempt) / "ranks", world_size=world_size)
        end = worst([*ends, *hangs])
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
        ask_to_stop(self._run, self._attempt)

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
                end_ranks(self._run, self._attempt, None, after_s=0.0)
                self._process.kill()
                say(f"{name} a third time: killed")
