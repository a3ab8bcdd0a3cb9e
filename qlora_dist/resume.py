"""What of a spec may change when a run goes on, key by key.

A key that is in neither table is what the run is: its data, its method, its optimizer, its seed.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from qlora_dist.errors import PlanError
from qlora_dist.spec import RunSpec

# Where and how the run is carried out; the result is the same.
FREE = frozenset(
    {
        "name",
        "run_dir",
        "model.token_file",
        "quantization.cache_dir",
        "data.store_dir",
        "data.num_samples",
        "checkpoint",
        "tracking",
        "evaluation.every_steps",
        "resources.backend",
        "resources.gpu",
        "resources.timeout_s",
        "resources.time",
        "resources.profile",
        "resources.pass_env",
    }
)
# The same samples in the same order, and results that differ: by rounding and by each rank's own
# dropout, or, for the schedule, from the next step on.
NOT_THE_SAME_BITS = frozenset(
    {
        "deterministic",
        "model.attention",
        "model.gradient_checkpointing",
        "batch.micro_size",
        "evaluation.micro_size",
        "schedule.steps",
        "schedule.epochs",
        "strategy.kind",
        "strategy.shard_adapter",
        "resources.nodes",
        "resources.gpus_per_node",
        "resources.processes_per_node",
        "resources.cpus_per_process",
    }
)
# May change because their content is compared: the tokens must be the same.
CHECKED_BY_CONTENT = frozenset(
    f"data.{mix}{name}"
    for mix in ("", "mix.")
    for name in ("source", "subset", "split", "revision")
)


def spec_sha256(spec: RunSpec) -> str:
    """Fingerprint of what may not change in the life of a run."""
    fixed = {key: value for key, value in _flat(spec).items() if not _may_change(key)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def check_change(before: RunSpec, now: RunSpec) -> list[str]:
    """Whether a run that began with one spec may go on with another.

    Returns:
        A line for each change after which results are no longer the same bits.

    Raises:
        PlanError: A key differs that may not; the message names each, and those that may.
    """
    old, new = _flat(before), _flat(now)
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    fixed = [key for key in changed if not _may_change(key)]
    if fixed:
        lines = [f"  {key}: was {old.get(key)!r}, is {new.get(key)!r}" for key in fixed]
        free = ", ".join(sorted(FREE | NOT_THE_SAME_BITS | CHECKED_BY_CONTENT))
        raise PlanError(
            "this would be another run:\n" + "\n".join(lines) + f"\nWhat may change: {free}"
        )
    return [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}: not bit for bit the same"
        for key in changed
        if key in NOT_THE_SAME_BITS
    ]


def _may_change(key: str) -> bool:
    section = key.partition(".")[0]
    key = re.sub(r"\.\d+(?=\.|$)", "", key)
    return section in FREE or key in FREE | NOT_THE_SAME_BITS | CHECKED_BY_CONTENT


def _flat(spec: RunSpec) -> dict[str, Any]:
    def walk(tree: object, prefix: str) -> Mapping[str, Any]:
        if isinstance(tree, list):
            tree = dict(enumerate(tree))
        if not isinstance(tree, dict):
            return {prefix: tree}
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            flat |= walk(value, f"{prefix}.{key}" if prefix else str(key))
        return flat

    return dict(walk(spec.model_dump(mode="json"), ""))
