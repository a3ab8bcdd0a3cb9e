"""Runs on the nodes of an allocation that somebody holds: inside salloc, or a job of one's own."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from qlora_dist.ends import RankEnd
from qlora_dist.errors import UserError
from qlora_dist.job import run_attempt
from qlora_dist.layout import RunDir
from qlora_dist.plan import Plan
from qlora_dist.scheduler import refuse_queued
from qlora_dist.step import ranks_on_nodes


class AllocationBackend:
    """A task a node, through srun, followed in the foreground; nothing is requeued."""

    def files(self, plan: Plan, run_dir: Path) -> dict[str, str]:
        """None: srun is started directly."""
        return {}

    def check(self, run: RunDir) -> None:
        """Refuse a run whose job waits in a queue; who has it now is seen when it is taken.

        Raises:
            RunDirError: It does.
        """
        refuse_queued(run)

    def submit(self, run: RunDir, plan: Plan, *, say: Callable[[str], None]) -> RankEnd:
        """Run the next attempt to its end.

        Raises:
            UserError: This is not inside an allocation, or it has too few nodes.
        """
        nodes = plan.topology.nodes
        if "SLURM_JOB_ID" not in os.environ:
            raise UserError(
                "resources.backend: allocation, and this shell is in none; get one first with: "
                f"salloc --nodes={nodes}"
            )
        held = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
        if held < nodes:
            raise UserError(
                f"resources.nodes: {nodes}, and this allocation has {held}; use "
                f"resources.nodes={held}, or salloc --nodes={nodes}"
            )
        return run_attempt(run, ranks_on_nodes, say=say, bar=sys.stderr.isatty())
