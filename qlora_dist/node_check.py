"""Whether a node can do its part, asked before anything is started on it. No torch.

What only a GPU's own process can tell is asked there (qlora_dist.train.gpu_check).
"""

import errno
import os
import subprocess
from pathlib import Path

from qlora_dist.errors import BadNodeError
from qlora_dist.files import fsync_file
from qlora_dist.layout import RunDir, open_run
from qlora_dist.plan import make_plan
from qlora_dist.spec import RunSpec

# A healthy driver answers in about a second, a broken one perhaps never.
_DRIVER_S = 60.0


def check_node(run: RunDir, node: str) -> None:
    """Look at what a run needs of this machine: storage, model, GPUs.

    Args:
        run: The run directory.
        node: This machine's name, for messages.

    Raises:
        BadNodeError: Something is missing or broken here; another machine may have it.
    """
    try:
        _check_storage(run, node)
        run, spec = open_run(run.root)
        _check_sources(spec)
        plan = make_plan(spec)
        if plan.topology.device == "cuda":
            _check_gpus(plan.topology.processes_per_node)
    except BadNodeError as error:
        raise BadNodeError(f"node {node}: {error}") from None


def _check_storage(run: RunDir, node: str) -> None:
    probe = run.control / f"probe-{node}"
    try:
        probe.write_bytes(b"probe")
        fsync_file(probe)
        probe.unlink()
    except OSError as error:
        # A full disk is full on every node; the run deals with that when it saves.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise BadNodeError(f"cannot write in {run.root}: {error.strerror}") from error


def _check_sources(spec: RunSpec) -> None:
    """Paths were absolute and there when the run was written."""
    sources = [spec.model.source, *(dataset.source for dataset in spec.data.datasets)]
    for source in sources:
        if Path(source).is_absolute() and not os.access(source, os.R_OK):
            raise BadNodeError(f"{source} is not there, or not readable: is a file system missing?")


def _check_gpus(wanted: int) -> None:
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_DRIVER_S, check=False
        )
    except FileNotFoundError:
        raise BadNodeError("there is no nvidia-smi, so no NVIDIA driver") from None
    except subprocess.TimeoutExpired:
        raise BadNodeError(f"nvidia-smi did not answer within {_DRIVER_S:.0f} s") from None
    if done.returncode:
        words = (done.stdout + done.stderr).strip()
        raise BadNodeError(f"nvidia-smi failed with code {done.returncode}: {words}")
    found = len(done.stdout.split("\n")) - 1
    if found < wanted:
        raise BadNodeError(f"{found} GPUs answer and the run needs {wanted}")
