"""Runs on this machine, in the foreground."""

import sys
from collections.abc import Callable
from pathlib import Path

from qlora_dist.ends import RankEnd
from qlora_dist.job import ranks_here, run_attempt
from qlora_dist.layout import RunDir
from qlora_dist.plan import Plan
from qlora_dist.scheduler import refuse_queued


class LocalBackend:
    """torchrun on this machine."""

    def files(self, plan: Plan, run_dir: Path) -> dict[str, str]:
        """None: torchrun is started directly."""
        return {}

    def check(self, run: RunDir) -> None:
        """Refuse a run whose job waits in a queue; who has it now is seen when it is taken.

        Raises:
            RunDirError: It does.
        """
        refuse_queued(run)

    def submit(self, run: RunDir, plan: Plan, *, say: Callable[[str], None]) -> RankEnd:
        """Run the next attempt to its end, a progress bar on a terminal, plain lines elsewhere."""
        return run_attempt(run, ranks_here, say=say, bar=sys.stderr.isatty())
