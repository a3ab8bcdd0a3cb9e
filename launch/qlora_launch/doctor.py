"""What a cluster will do to a run, whether it has been started or not."""

import json
from collections.abc import Sequence
from pathlib import Path

from qlora_dist.diagnosis import Diagnosis
from qlora_dist.layout import RunDir, open_run, run_dir_of
from qlora_dist.ledger import measured, shortest_step_s
from qlora_dist.plan import make_plan
from qlora_dist.spec import RunSpec
from qlora_dist.spec_file import load_spec, spec_from_tree
from qlora_launch.backends import get_doctor


def examine(path: str, overrides: Sequence[str], profile: str | None) -> tuple[str, Diagnosis]:
    """Examine a config or a run directory as a job of this machine's cluster.

    Args:
        path: YAML file, or run directory.
        overrides: As ``section.key=value``.
        profile: Cluster profile; None for the one that the spec names.

    Returns:
        The run's name, and what was found.

    Raises:
        QLoRAError: The spec is wrong, or the cluster cannot be read.
    """
    changes = [*overrides, "resources.backend=slurm"]
    if profile is not None:
        # JSON is YAML, whatever the path has in it.
        changes.append(f"resources.profile={json.dumps(profile)}")
    spec, root = _open(path, changes)
    run = RunDir(root)
    found = get_doctor("slurm").examine(make_plan(spec), measured(run), shortest_step_s(run))
    return spec.name, found


def _open(path: str, overrides: Sequence[str]) -> tuple[RunSpec, Path]:
    if not Path(path).is_dir():
        spec = load_spec(path, overrides)
        return spec, run_dir_of(spec)
    run, before = open_run(path)
    tree = before.model_dump(mode="json")
    return spec_from_tree(tree, overrides, source=str(run.run_json)), run.root
