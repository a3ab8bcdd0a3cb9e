"""Which process this is, by its environment; the only place that reads it. Imports no torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from string import Template


@dataclass(frozen=True)
class Place:
    """What torchrun and the launcher say to a process.

    Attributes:
        rank: Global rank.
        size: Processes over all nodes.
        local_rank: Rank on this node.
        attempt: Attempt that our launcher has begun; None under another launcher.
        fault: A fault to inject (qlora_dist.faults); None for none.
        node: Slurm's name for this machine; empty outside Slurm.
        local_dir: A folder on this node's own storage for what is read often; empty for none.
    """

    rank: int
    size: int
    local_rank: int
    attempt: int | None
    fault: str | None = None
    node: str = ""
    local_dir: str = ""

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "Place":
        """Read torchrun's RANK, WORLD_SIZE and LOCAL_RANK, ours, and SLURMD_NODENAME.

        The folder of QLORA_LOCAL_DIR may be named by variables, such as /local/$SLURM_JOB_ID.
        """
        attempt = env.get("QLORA_ATTEMPT")
        return cls(
            int(env.get("RANK", "0")),
            int(env.get("WORLD_SIZE", "1")),
            int(env.get("LOCAL_RANK", "0")),
            None if attempt is None else int(attempt),
            env.get("QLORA_FAULT"),
            env.get("SLURMD_NODENAME", ""),
            Template(env.get("QLORA_LOCAL_DIR", "")).safe_substitute(env),
        )
