"""What an attempt says, as it says it."""

import time
from collections.abc import Callable

from qlora_dist.console import Tail
from qlora_dist.errors import RunDirError
from qlora_dist.layout import RunDir, newest_attempt
from qlora_dist.ledger import standing
from qlora_dist.spec import RunSpec

_POLL_S = 0.5
# How often the scheduler is asked whether anything more is to come.
_ASK_S = 10.0


def follow(
    run: RunDir, spec: RunSpec, *, say: Callable[[str], None], rank: int | None, to_the_end: bool
) -> None:
    """Print the newest attempt's lines.

    Args:
        run: The run directory.
        spec: Its spec.
        say: Takes each line.
        rank: What this rank printed, instead of the run's own lines.
        to_the_end: Go on, through requeues, until the run neither runs nor waits.

    Raises:
        RunDirError: Nothing was ever started.
    """
    attempt = newest_attempt(run)
    if attempt is None and not to_the_end:
        raise RunDirError(f"{run.root} has not been started yet")
    tail, number, asked, owned, told = None, None, -_ASK_S, False, ""
    while True:
        attempt = newest_attempt(run)
        if attempt is not None and attempt != number:
            number = attempt
            tail = Tail(run.run_log(number) if rank is None else run.rank_log(number, rank))
        for line in tail.new_lines() if tail else ():
            say(line)
        if not to_the_end:
            return
        owned, before = run.owner_json.exists(), owned
        if time.monotonic() - asked > _ASK_S or (before and not owned):
            asked = time.monotonic()
            now = standing(run, spec)
            over = now.state not in ("running", "queued", "unknown")
            if over and newest_attempt(run) != number:
                continue
            for line in tail.new_lines() if tail else ():
                say(line)
            if now.state != "running" and now.detail != told:
                told = now.detail
                say(f"{now.state}: {now.detail}")
            if over:
                return
        time.sleep(_POLL_S)
