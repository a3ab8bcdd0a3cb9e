"""Where a run can be started: a table of names, imported on use."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from qlora_dist.diagnosis import Diagnosis
from qlora_dist.ends import RankEnd
from qlora_dist.errors import PlanError
from qlora_dist.layout import RunDir
from qlora_dist.ledger import Measured
from qlora_dist.plan import Plan

BACKENDS: dict[str, str] = {
    "local": "qlora_launch.local:LocalBackend",
    "allocation": "qlora_launch.allocation:AllocationBackend",
    "slurm": "qlora_slurm.submit:SlurmBackend",
}


# Who can say what a scheduler will do to a run.
DOCTORS: dict[str, str] = {"slurm": "qlora_slurm.doctor:SlurmDoctor"}


class Backend(Protocol):
    """Starts attempts of a run."""

    def files(self, plan: Plan, run_dir: Path) -> dict[str, str]:
        """What the run directory holds for this backend alone, by name."""
        ...

    def check(self, run: RunDir) -> None:
        """Refuse a run that cannot be started here now, before anything of it is changed.

        Raises:
            UserError: It cannot.
        """
        ...

    def submit(self, run: RunDir, plan: Plan, *, say: Callable[[str], None]) -> RankEnd | None:
        """Start the next attempt; a local one is followed to its end, a queued one gives None."""
        ...


class Queue(Backend, Protocol):
    """A backend that runs wait in."""

    def submit_sweep(
        self, runs: Sequence[RunDir], plan: Plan, parallel: int, *, say: Callable[[str], None]
    ) -> None:
        """Send several runs of one folder at once."""
        ...

    def warn(self, plan: Plan, *, say: Callable[[str], None]) -> None:
        """Warn of a run that would never start."""
        ...

    def sweep_script(self, runs: Sequence[RunDir], plan: Plan, parallel: int) -> str:
        """What that would send."""
        ...


def get_queue(after: Sequence[str]) -> Queue:
    """Import Slurm's backend, for runs that start after others have ended well."""
    queue: Queue = _load("slurm", BACKENDS["slurm"], after)
    return queue


class Doctor(Protocol):
    """Reads a site, and says what it will do to a run."""

    def examine(self, plan: Plan, measured: Measured | None, step_s: float | None) -> Diagnosis:
        """Say what will happen to a run there."""
        ...


def get_backend(name: str) -> Backend:
    """Import the backend that a spec names.

    Raises:
        PlanError: This version cannot start runs there.
    """
    if name not in BACKENDS:
        raise PlanError(
            f"resources.backend: {name} does not run yet; what runs: {', '.join(BACKENDS)}"
        )
    backend: Backend = _load(name, BACKENDS[name])
    return backend


def get_doctor(name: str) -> Doctor:
    """Import a backend's doctor.

    Raises:
        PlanError: What it needs is not installed.
    """
    doctor: Doctor = _load(name, DOCTORS[name])
    return doctor


def _load(name: str, path: str, *args: object) -> Any:
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)(*args)
    except ModuleNotFoundError as error:
        raise PlanError(
            f"resources.backend: {name} needs {error.name}; pip install 'qlora-dist[{name}]'"
        ) from error
