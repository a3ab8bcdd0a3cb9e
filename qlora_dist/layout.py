"""Names inside a run directory, and what is read back from it.

::

    run.json          the resolved spec: the one source of truth for every process of the run
    accelerate.yaml   what `accelerate launch` needs to start the same processes
    ds_config.json    what DeepSpeed's engine reads (zero2, zero3)
    command.json      arguments and environment of torchrun
    container.json    what a node's task runs in, if in anything
    code/             the qlora_dist package that the run's processes execute
    code.json         its commit, a hash of each file, versions; code.diff: what was not committed
    owner.json        which launcher has the run now
    control/          requests to a running attempt, such as stop-000 (qlora_dist.control)
    attempts/000/     attempt.json, environment.json, ranks/, beats/, logs/
    metrics.jsonl     one line a step, one line an evaluation; a resume cuts it back
    checkpoints/      step_000100/ and so on
    adapter/          PEFT format
    model/            Hugging Face format, of full fine-tuning
    merged/           Hugging Face format
    tracking/         event files
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from qlora_dist.errors import RunDirError, SpecError
from qlora_dist.spec import RunSpec
from qlora_dist.spec_file import spec_from_tree

# How a node's task is started where it runs in a container (slurm/qlora_slurm/container.py).
CONTAINER = "container.json"
# In the folder of a sweep: its runs, in the order of the array's elements.
SWEEP = "sweep.json"


@dataclass(frozen=True)
class RunDir:
    """Paths of one run."""

    root: Path

    @property
    def run_json(self) -> Path:
        """The resolved spec."""
        return self.root / "run.json"

    @property
    def accelerate_yaml(self) -> Path:
        """Configuration of ``accelerate launch``."""
        return self.root / "accelerate.yaml"

    @property
    def ds_config(self) -> Path:
        """Configuration of DeepSpeed's engine."""
        return self.root / "ds_config.json"

    @property
    def command_json(self) -> Path:
        """Arguments and environment of torchrun."""
        return self.root / "command.json"

    @property
    def code(self) -> Path:
        """The package that the run's processes execute, in a folder to put on Python's path."""
        return self.root / "code"

    @property
    def code_json(self) -> Path:
        """Where the code is from, and what it is."""
        return self.root / "code.json"

    @property
    def code_diff(self) -> Path:
        """What of it was not committed."""
        return self.root / "code.diff"

    @property
    def owner_json(self) -> Path:
        """The launcher that has the run."""
        return self.root / "owner.json"

    @property
    def control(self) -> Path:
        """Requests to a running attempt."""
        return self.root / "control"

    @property
    def attempts(self) -> Path:
        """One folder an attempt."""
        return self.root / "attempts"

    @property
    def metrics(self) -> Path:
        """One JSON line a step."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Committed and partial checkpoints."""
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter."""
        return self.root / "adapter"

    @property
    def model(self) -> Path:
        """The trained model, of full fine-tuning."""
        return self.root / "model"

    @property
    def merged(self) -> Path:
        """The merged model."""
        return self.root / "merged"

    @property
    def tracking(self) -> Path:
        """Event files."""
        return self.root / "tracking"

    def attempt(self, number: int) -> Path:
        """Folder of one attempt."""
        return self.attempts / f"{number:03d}"

    def environment_json(self, attempt: int) -> Path:
        """What an attempt's processes got of the environment."""
        return self.attempt(attempt) / "environment.json"

    def rank_file(self, attempt: int, rank: int) -> Path:
        """How one rank of an attempt ended."""
        return self.attempt(attempt) / "ranks" / f"{rank:05d}.json"

    def beats(self, attempt: int) -> Path:
        """Signs of life of an attempt's ranks."""
        return self.attempt(attempt) / "beats"

    def rank_log(self, attempt: int, rank: int) -> Path:
        """Everything that one rank printed."""
        return self.attempt(attempt) / "logs" / f"rank_{rank:05d}.log"

    def run_log(self, attempt: int) -> Path:
        """What the run has to say to a person; written by rank 0."""
        return self.attempt(attempt) / "logs" / "run.log"

    def launcher_log(self, attempt: int) -> Path:
        """What torchrun printed."""
        return self.attempt(attempt) / "logs" / "torchrun.log"

    @property
    def submitted_json(self) -> Path:
        """What is known of the environment that the newest job was submitted from."""
        return self.control / "submitted.json"

    @property
    def element_json(self) -> Path:
        """Which element of which sweep the run was last submitted as."""
        return self.control / "element.json"

    @property
    def cancel_file(self) -> Path:
        """There when the run is not to be started again by itself."""
        return self.control / "cancel"

    def stop_file(self, attempt: int) -> Path:
        """There when the attempt is asked to save and end."""
        return self.control / f"stop-{attempt:03d}"

    def kill_file(self, attempt: int) -> Path:
        """There when the attempt's ranks are to write down their stacks and be killed."""
        return self.control / f"kill-{attempt:03d}"


def open_run(path: str | Path) -> tuple[RunDir, RunSpec]:
    """Open an existing run directory.

    Raises:
        RunDirError: There is no run here, or its run.json is damaged or of another version.
    """
    run = RunDir(Path(path).expanduser().absolute())
    try:
        if run.run_json.stat().st_uid != os.geteuid():
            raise RunDirError(f"{run.root} belongs to another user, and a run starts programs")
        tree = json.loads(run.run_json.read_text(encoding="utf-8"))
        spec = spec_from_tree(tree["spec"], source=str(run.run_json))
    except NotADirectoryError:
        raise RunDirError(
            f"{run.root} is a file, not a run directory; a config is started with: qlora run CONFIG"
        ) from None
    except FileNotFoundError:
        if sweep_runs(run.root):
            raise RunDirError(
                f"{run.root} is a sweep; see its runs with: qlora list {run.root}"
            ) from None
        raise RunDirError(
            f"{run.root} is no run directory: it has no run.json. Start one with: qlora run CONFIG"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, SpecError) as error:
        raise RunDirError(f"{run.run_json} cannot be read: {error}") from error
    return run, spec


def sweep_runs(folder: Path) -> list[str]:
    """Names of a sweep's runs, in the order of its array; empty for a folder that is none."""
    try:
        tree = json.loads((folder / SWEEP).read_text(encoding="utf-8"))
        return [str(name) for name in tree["runs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def run_dir_of(spec: RunSpec) -> Path:
    """Folder of a run, absolute."""
    return Path(spec.run_dir or f"runs/{spec.name}").expanduser().absolute()


def corpora_dir(spec: RunSpec, run_root: Path) -> Path:
    """Folder of the tokenised corpora, which runs beside one another share."""
    return Path(spec.data.store_dir or run_root.parent / "corpora").expanduser()


def newest_attempt(run: RunDir) -> int | None:
    """Number of the newest attempt; None before the first."""
    try:
        numbers = [int(path.name) for path in run.attempts.iterdir() if path.name.isdigit()]
    except FileNotFoundError:
        return None
    return max(numbers, default=None)
