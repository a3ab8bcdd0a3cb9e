"""What a run's attempts were, and where it stands: read from its directory and from Slurm."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dist import ends
from qlora_dist.checkpoints import newest_step
from qlora_dist.layout import RunDir
from qlora_dist.process import Process
from qlora_dist.scheduler import SchedulerError, SlurmJob, live_jobs, show_job
from qlora_dist.spec import RunSpec


@dataclass(frozen=True)
class AttemptRow:
    """One attempt.

    Attributes:
        where: Process or job.
        nodes: As Slurm writes them; empty for a local attempt.
        started_at: Seconds since the epoch.
        ended_at: The same; None while it runs, or where it ended without a word.
        began_after: Step that it went on from.
        last_step: Last step that it completed.
        kept_steps: Steps of it that the run still has.
        step_s: Seconds that those took.
        code: How it ended (qlora_dist.ends); None as ``ended_at``.
        cause: The same for a person.
        following: What was decided.
    """

    number: int
    where: str
    nodes: str
    started_at: float
    ended_at: float | None
    began_after: int
    last_step: int
    kept_steps: int
    step_s: float
    code: int | None
    cause: str
    following: str

    @property
    def lost_steps(self) -> int:
        """Completed steps that a later attempt had to take again."""
        return self.last_step - self.began_after - self.kept_steps if self.ended_at else 0


@dataclass(frozen=True)
class Standing:
    """Where a run stands.

    Attributes:
        state: "new", "queued", "running", "stopped", "failed" or "done".
        detail: One line for a person.
        step: Last committed step.
        attempts: In their order.
    """

    state: str
    detail: str
    step: int
    attempts: tuple[AttemptRow, ...]

    @property
    def goodput(self) -> float | None:
        """Part of the attempts' time that went into steps that the run still has; None before."""
        spent = sum((row.ended_at or time.time()) - row.started_at for row in self.attempts)
        return sum(row.step_s for row in self.attempts) / spent if spent else None


@dataclass(frozen=True)
class Measured:
    """What a stop of a run takes.

    Attributes:
        micro_s: The longest micro-step, in seconds.
        save_s: The longest save, in seconds.
    """

    micro_s: float
    save_s: float


def measured(run: RunDir) -> Measured | None:
    """What the newest attempt that has saved took; None before there is one."""
    return None


def shortest_step_s(run: RunDir) -> float | None:
    """The shortest step that the run has, in seconds; None before the first."""
    return min((record["step_s"] for record in _train_records(run)), default=None)


def last_step(run: RunDir, attempt: int) -> int:
    """Last step that an attempt has completed, as metrics.jsonl has it now; 0 for none."""
    steps = [r["step"] for r in _train_records(run) if r["attempt"] == attempt]
    return max(steps, default=0)


def standing(run: RunDir, spec: RunSpec) -> Standing:
    """Read where a run stands, asking Slurm where the run is one of its jobs."""
    rows = tuple(_attempts(run))
    state, detail = _state(run, spec, rows)
    return Standing(state, detail, newest_step(run.checkpoints), rows)


def _state(run: RunDir, spec: RunSpec, rows: tuple[AttemptRow, ...]) -> tuple[str, str]:
    owner = _read(run.owner_json)
    try:
        if owner and "job" in owner:
            if not SlurmJob(**owner).is_gone():
                return "running", f"job {owner['job']}"
        elif owner and Process(**owner).is_gone() is False:
            return "running", f"process {owner['pid']} on {owner['host']}"
        if spec.resources.backend == "slurm" and (jobs := live_jobs(run.root)):
            view = show_job(jobs[0])
            why = f", {view.state} ({view.reason})" if view else ""
            return "queued", f"job {jobs[0]}{why}"
    except SchedulerError as error:
        return "unknown", str(error)
    if not rows:
        return "new", "never started"
    last = rows[-1]
    if last.code is None:
        return "failed", "ended without a word"
    states = {ends.DONE: "done", ends.PREEMPTED: "stopped", ends.TIME_LIMIT: "stopped"}
    return states.get(last.code, "failed"), last.cause


def _attempts(run: RunDir) -> Iterator[AttemptRow]:
    records = list(_train_records(run))
    folders = sorted(run.attempts.iterdir()) if run.attempts.is_dir() else []
    for folder in folders:
        tree = _read(folder / "attempt.json")
        if not tree:
            continue
        number = int(tree["attempt"])
        kept = [record for record in records if record["attempt"] == number]
        end: dict[str, Any] = tree.get("end") or {}
        launcher = tree["launcher"]
        where = (
            f"job {launcher['job']}.{launcher['restart']}"
            if "job" in launcher
            else f"{launcher['host']}:{launcher['pid']}"
        )
        began = tree["began_after"]
        yield AttemptRow(
            number=number,
            where=where,
            nodes=tree.get("nodes", ""),
            started_at=tree["started_at"],
            ended_at=tree.get("ended_at"),
            began_after=began,
            last_step=max(began, tree.get("last_step", kept[-1]["step"] if kept else 0)),
            kept_steps=len(kept),
            step_s=sum(record["step_s"] for record in kept),
            code=end.get("code"),
            cause=end.get("cause", ""),
            following=tree.get("next", ""),
        )


def _train_records(run: RunDir) -> Iterator[dict[str, Any]]:
    try:
        text = run.metrics.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    for line in text.splitlines():
        # The last line may be one that is being written.
        if line.endswith("}"):
            record = json.loads(line)
            if record["kind"] == "train":
                yield record


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}
