"""Plan to Bundle: every file, argv and environment variable of a run, as values.

``--dry-run`` prints a bundle and stops; a real run writes the same bundle and starts it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_dist import __version__
from qlora_dist.code_tree import path_env
from qlora_dist.engine_config import accelerate_config, deepspeed_config
from qlora_dist.layout import run_dir_of
from qlora_dist.plan import Plan
from qlora_dist.torchrun import ALONE, torchrun_argv
from qlora_launch.backends import BACKENDS, get_backend

# Compute nodes often have no way out, and a hundred processes that each ask the hub are a burden.
_OFFLINE_BACKENDS = frozenset({"slurm"})


@dataclass(frozen=True)
class Bundle:
    """A run, ready to be written and started.

    Attributes:
        run_dir: Its folder, absolute.
        files: Name inside the folder -> text.
        argv: What each node executes.
        env: Variables that are set on top of the environment there.
    """

    run_dir: Path
    files: dict[str, str]
    argv: tuple[str, ...]
    env: dict[str, str]


def render(plan: Plan) -> Bundle:
    """Put a plan into files and a command; touches nothing.

    Raises:
        PlanError: The run directory's name cannot be on Python's path.
    """
    spec = plan.spec
    run_dir = run_dir_of(spec)
    options = torchrun_options(plan)
    env = process_env(plan)
    files = {
        "run.json": _json(
            {
                "written_by": f"qlora-dist {__version__}",
                "spec": spec.model_dump(mode="json"),
                "plan": plan.to_json(),
            }
        ),
        "accelerate.yaml": yaml.safe_dump(accelerate_config(plan), sort_keys=True),
        "command.json": _json(
            {
                "torchrun": list(options),
                "env": env,
                "pass_env": spec.resources.pass_env,
                "nodes": plan.topology.nodes,
                "world_size": plan.topology.world_size,
                "timeout_s": spec.resources.timeout_s,
            }
        ),
    }
    if spec.resources.backend in BACKENDS:
        files |= get_backend(spec.resources.backend).files(plan, run_dir)
    engine = deepspeed_config(plan)
    if engine is not None:
        files["ds_config.json"] = _json(engine)
    argv = tuple(torchrun_argv(ALONE, options, run_dir))
    # Not in a file: a run may be moved.
    return Bundle(run_dir, files, argv, env | path_env(run_dir))


def torchrun_options(plan: Plan) -> tuple[str, ...]:
    """Options of torchrun that are the same wherever the run is started."""
    return (
        f"--nproc-per-node={plan.topology.processes_per_node}",
        "--max-restarts=0",
        "--monitor-interval=0.2",
    )


def is_offline(plan: Plan) -> bool:
    """Whether the run's processes have only what is in the Hugging Face cache."""
    return plan.spec.resources.backend in _OFFLINE_BACKENDS


def process_env(plan: Plan) -> dict[str, str]:
    """Environment of the training processes, beyond what the launcher itself has."""
    env = {
        # Rust tokenizers warn, and may dead-lock, when used before and after a fork.
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONUNBUFFERED": "1",
    }
    if is_offline(plan):
        env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if plan.topology.device == "cuda":
        # Less fragmentation where lengths of batches vary.
        env["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    elif plan.spec.resources.cpus_per_process is not None:
        env["OMP_NUM_THREADS"] = str(plan.spec.resources.cpus_per_process)
    return env


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
