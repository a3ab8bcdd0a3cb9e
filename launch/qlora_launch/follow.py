"""What an attempt says, as it says it."""

import time
from collections.abc import Callable

from qlora_dist import ends
from qlora_dist.console import Tail
from qlora_dist.errors import RunDirError
from qlora_dist.layout import RunDir, newest_attempt
from qlora_dist.ledger import Standing, end_of, failure_lines, standing
from qlora_dist.spec import RunSpec

_POLL_S = 0.5
# How often the scheduler is asked whether anything more is to come.
_ASK_S = 10.0


def follow(
    run: RunDir, spec: RunSpec, *, say: Callable[[str], None], rank: int | None, to_the_end: bool
) -> int:
    """Print the newest attempt's lines, and why it failed if it has.

    Args:
        run: The run directory.
        spec: Its spec.
        say: Takes each line.
        rank: What this rank printed, instead of the run's own lines.
        to_the_end: Go on, through requeues, until the run neither runs nor waits.

    Returns:
        What the run ended with, if that was asked for; else 0.

    Raises:
        RunDirError: Nothing was ever started.
    """
    if newest_attempt(run) is None and not to_the_end:
        raise RunDirError(f"{run.root} has not been started yet")
    lines, asked, owned, told = _Lines(run, rank), -_ASK_S, False, ""
    while True:
        lines.tell(say)
        if not to_the_end:
            _tell_failure(run, lines.attempt, say)
            return ends.DONE
        owned, before = run.owner_json.exists(), owned
        if time.monotonic() - asked > _ASK_S or (before and not owned):
            asked = time.monotonic()
            now = standing(run, spec)
            over = now.state not in ("running", "queued", "unknown")
            if over and newest_attempt(run) != lines.attempt:
                continue
            lines.tell(say)
            if now.state != "running" and now.detail != told:
                told = now.detail
                say(f"{now.state}: {now.detail}")
            if over:
                _tell_failure(run, lines.attempt, say)
                return exit_code(now)
        time.sleep(_POLL_S)


def exit_code(now: Standing) -> int:
    """What a run that is over ended with; a failure if it could not say so."""
    code = now.attempts[-1].code if now.attempts else ends.DONE
    return ends.FAILED if code is None else code


def _tell_failure(run: RunDir, attempt: int | None, say: Callable[[str], None]) -> None:
    """Say how an attempt failed, if it has."""
    end = None if attempt is None else end_of(run, attempt)
    if attempt is not None and end is not None and end.code not in ends.AGREED:
        for line in failure_lines(run, attempt, end):
            say(line)


class _Lines:
    """What a run's attempts say, one after the other.

    Attributes:
        attempt: The newest that was looked at.
    """

    def __init__(self, run: RunDir, rank: int | None) -> None:
        self.attempt: int | None = None
        self._run, self._rank = run, rank
        self._tail: Tail | None = None

    def tell(self, say: Callable[[str], None]) -> None:
        """Say what is new, of the newest attempt."""
        newest, rank = newest_attempt(self._run), self._rank
        if newest is not None and newest != self.attempt:
            self.attempt = newest
            run = self._run
            self._tail = Tail(run.run_log(newest) if rank is None else run.rank_log(newest, rank))
        for line in self._tail.new_lines() if self._tail else ():
            say(line)
