"""How a node's task is started where the processes of a node run in a container."""

import os
from pathlib import Path
from typing import Any

from qlora_dist.layout import corpora_dir
from qlora_dist.plan import Plan
from qlora_slurm.site_profile import ApptainerContainer, NoContainer, Profile


def container_json(plan: Plan, profile: Profile, run_dir: Path) -> dict[str, Any] | None:
    """What the batch process puts around a node's task; None for nothing.

    Returns:
        ``srun``, options of it, and ``argv``, the words of the task up to the interpreter.
    """
    container = profile.container
    if isinstance(container, NoContainer):
        return None
    spec = plan.spec
    # What a spec names by path must be seen inside, wherever it is.
    sources = [spec.model.source, *(dataset.source for dataset in spec.data.datasets)]
    paths = [
        path for path in (*sources, spec.model.token_file) if path and Path(path).is_absolute()
    ]
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    own = [str(run_dir), str(corpora_dir(spec, run_dir)), *([str(home)] if home.is_dir() else [])]
    seen = list(dict.fromkeys([*own, *paths, *container.binds]))
    if isinstance(container, ApptainerContainer):
        nvidia = ["--nv"] if plan.topology.device == "cuda" else []
        binds = [word for folder in seen for word in ("--bind", folder)]
        argv = ["apptainer", "exec", *nvidia, *binds, container.image, container.python]
        return {"srun": [], "argv": argv}
    mounts = ",".join(f"{folder}:{folder}" for folder in seen)
    options = [f"--container-image={container.image}", f"--container-mounts={mounts}"]
    return {"srun": options, "argv": [container.python]}
