"""Runs on this machine, in the foreground."""

import sys
from collections.abc import Callable

from qlora_dist.ends import RankEnd
from qlora_dist.job import run_attempt
from qlora_dist.layout import RunDir


class LocalBackend:
    """torchrun on this machine."""

    def submit(self, run: RunDir, *, say: Callable[[str], None]) -> RankEnd:
        """Run the next attempt to its end, a progress bar on a terminal, plain lines elsewhere."""
        return run_attempt(run, say=say, progress=sys.stderr.isatty())
