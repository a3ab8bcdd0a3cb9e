"""What a run's attempts were, and where it stands: read from its directory and from Slurm."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_dist import ends
from qlora_dist.attempt import note
from qlora_dist.beats import read_beats
from qlora_dist.checkpoints import newest_step
from qlora_dist.ends import RankEnd
from qlora_dist.layout import RunDir, newest_attempt
from qlora_dist.process import Process
from qlora_dist.scheduler import Queue, SchedulerError, SlurmJob, show_job
from qlora_dist.spec import RunSpec

# squeue(1), REASON CODES: those that no waiting mends.
_NEVER = frozenset(
    {"PartitionTimeLimit", "PartitionNodeLimit", "DependencyNeverSatisfied", "BadConstraints"}
)


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
        why: Why that.
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
    why: str

    @property
    def lost_steps(self) -> int:
        """Completed steps that a later attempt had to take again."""
        return self.last_step - self.began_after - self.kept_steps if self.ended_at else 0


@dataclass(frozen=True)
class Standing:
    """Where a run stands.

    Attributes:
        state: "new", "queued", "running", "stopped", "failed", "done" or "unknown".
        detail: One line for a person.
        step: Last committed step.
        attempts: In their order.
    """

    state: str
    detail: str
    step: int
    attempts: tuple[AttemptRow, ...]

    @property
    def last_step(self) -> int:
        """Last step that any attempt has completed."""
        return max((row.last_step for row in self.attempts), default=0)

    @property
    def goodput(self) -> float | None:
        """Part of the attempts' time that went into steps that the run still has; None before."""
        spent = sum((row.ended_at or time.time()) - row.started_at for row in self.attempts)
        return sum(row.step_s for row in self.attempts) / spent if spent else None


def shortest_step_s(run: RunDir) -> float | None:
    """The shortest step that the run has, in seconds; None before the first."""
    return min((record["step_s"] for record in _train_records(run)), default=None)


def last_step(run: RunDir, attempt: int) -> int:
    """Last step that an attempt has completed, as metrics.jsonl has it now; 0 for none."""
    steps = [r["step"] for r in _train_records(run) if r["attempt"] == attempt]
    return max(steps, default=0)


def note_end(run: RunDir, attempt: int, end: RankEnd, **more: object) -> None:
    """Write down how an attempt ended, and what it leaves.

    Raises:
        OSError: The disk refuses it.
    """
    note(
        run,
        attempt,
        ended_at=time.time(),
        end=asdict(end),
        last_step=last_step(run, attempt),
        committed_step=newest_step(run.checkpoints),
        **more,
    )


def end_of(run: RunDir, attempt: int) -> RankEnd | None:
    """How an attempt ended; None while it runs, or where nobody could say."""
    tree = _read(run.attempt(attempt) / "attempt.json").get("end")
    return None if tree is None else RankEnd(**tree)


def failure_lines(run: RunDir, attempt: int, end: RankEnd) -> list[str]:
    """How an attempt failed, and where to read more of it."""
    if end.code == ends.USER_ERROR:
        return [f"qlora: {end.cause}"]
    log = run.rank_log(attempt, end.rank)
    if end.cause == ends.SILENT:
        left = f"what it left: {log} and {run.launcher_log(attempt)}"
        return [f"qlora: rank {end.rank} {end.cause}", left]
    if end.code == ends.HANG:
        return [f"qlora: {end.cause}", f"stacks: {log.parent}/rank_*.log"]
    where = f"rank {end.rank} failed after step {end.step}; its log: {log}"
    return [f"qlora: {end.cause}", where]


def codes_without_progress(run: RunDir, step: int) -> list[int]:
    """How the attempts before the newest ended, newest first, since ``step`` was committed.

    One that was killed before it could say so counts as preempted, which is what most are.
    """
    codes = []
    for folder in _folders(run)[-2::-1]:
        tree = _read(folder / "attempt.json")
        if tree.get("began_after") != step:
            break
        codes.append(int(tree["end"]["code"]) if "end" in tree else ends.PREEMPTED)
    return codes


def bad_nodes(run: RunDir) -> set[str]:
    """Nodes on which attempts ended that they could not begin."""
    trees = (_read(folder / "attempt.json") for folder in _folders(run))
    found = [tree["end"] for tree in trees if "end" in tree]
    return {end["node"] for end in found if end["code"] == ends.BAD_NODE and end.get("node")}


@dataclass(frozen=True)
class Measured:
    """What stopping a run takes, as it was measured in it.

    Attributes:
        micro_s: Longest micro-batch, in seconds.
        save_s: Longest save, from its begin to its commit, in seconds.
    """

    micro_s: float
    save_s: float


def measured(run: RunDir) -> Measured | None:
    """The newest attempt's figures that has saved; None before the first save."""
    newest = newest_attempt(run)
    for attempt in reversed(range(0 if newest is None else newest + 1)):
        beats = read_beats(run, attempt).values()
        save_s = max((beat.save_s for beat in beats), default=0.0)
        if save_s:
            return Measured(max(beat.micro_s for beat in beats), save_s)
    return None


# What Slurm has just answered, or why it has not, for those who look at many runs.
Answer = Queue | SchedulerError


def standing(run: RunDir, spec: RunSpec, queue: Answer | None = None) -> Standing:
    """Read where a run stands, asking Slurm where the run is one of its jobs.

    Args:
        run: The run directory.
        spec: Its spec.
        queue: What Slurm said; None to ask it.
    """
    rows = tuple(_attempts(run))
    state, detail = _state(run, spec, rows, queue)
    return Standing(state, detail, newest_step(run.checkpoints), rows)


def _state(
    run: RunDir, spec: RunSpec, rows: tuple[AttemptRow, ...], queue: Answer | None
) -> tuple[str, str]:
    try:
        live = _owned(run, queue) or _queued(run, spec, queue)
    except SchedulerError as error:
        if rows and rows[-1].following == "nothing" and not run.owner_json.exists():
            # Its own word was that nothing follows.
            return _over(rows[-1])
        return "unknown", str(error)
    if live:
        return live
    if not rows:
        return "new", "never started"
    return _over(rows[-1])


def _over(last: AttemptRow) -> tuple[str, str]:
    """How a run stands whose last attempt nothing follows."""
    if last.code is None:
        return "failed", "ended without a word"
    states = {ends.DONE: "done", ends.PREEMPTED: "stopped", ends.TIME_LIMIT: "stopped"}
    why = f"; {last.why}" if last.why and last.code != ends.DONE else ""
    return states.get(last.code, "failed"), f"{last.cause}{why}"


def _owned(run: RunDir, queue: Answer | None) -> tuple[str, str] | None:
    """Whether a launcher has the run now."""
    owner = _read(run.owner_json)
    if "job" in owner:
        if isinstance(queue, SchedulerError):
            raise queue
        return None if SlurmJob(**owner).is_gone() else ("running", f"job {owner['job']}")
    if not owner:
        return None
    gone, where = Process(**owner).is_gone(), f"process {owner['pid']} on {owner['host']}"
    if gone is None:
        return "unknown", f"{where}, which cannot be seen from here"
    return None if gone else ("running", where)


def _queued(run: RunDir, spec: RunSpec, queue: Answer | None) -> tuple[str, str] | None:
    """Whether it waits in Slurm's queue."""
    if spec.resources.backend != "slurm" or not run.submitted_json.exists():
        return None
    if isinstance(queue, SchedulerError):
        raise queue
    jobs = (queue or Queue.read()).jobs_of(run.root)
    return ("queued", _waits(jobs[0])) if jobs else None


def _waits(job: str) -> str:
    view = show_job(job)
    if view is None:
        return f"job {job}"
    if view.state in ("RUNNING", "CONFIGURING", "COMPLETING"):
        return f"job {job} {'ends' if view.state == 'COMPLETING' else 'starts'}"
    text = f"job {job}, {view.state} ({view.reason})"
    if view.reason in _NEVER:
        return f"{text}: it will not start as it is; cancel it, and submit it with other resources"
    if view.start_time and view.start_time > time.time():
        when = time.strftime("%m-%d %H:%M", time.localtime(view.start_time))
        text += f", Slurm expects it to start at {when}"
    return text


def _attempts(run: RunDir) -> Iterator[AttemptRow]:
    records = list(_train_records(run))
    folders = _folders(run)
    for place, folder in enumerate(folders):
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
            ended_at=tree.get("ended_at") or _silent_end(run, folders, place),
            began_after=began,
            last_step=max(began, tree.get("last_step", kept[-1]["step"] if kept else 0)),
            kept_steps=len(kept),
            step_s=sum(record["step_s"] for record in kept),
            code=end.get("code"),
            cause=end.get("cause", ""),
            following=tree.get("next", ""),
            why=tree.get("why", ""),
        )


def _silent_end(run: RunDir, folders: list[Path], place: int) -> float | None:
    """When an attempt that does not say was last heard of; None while it may run."""
    if place + 1 == len(folders) and run.owner_json.exists():
        return None
    beats = read_beats(run, int(folders[place].name)).values()
    began = (folders[place] / "attempt.json").stat().st_mtime
    return max((beat.time for beat in beats), default=began)


def _folders(run: RunDir) -> list[Path]:
    """Folders of the attempts, in their order."""
    if not run.attempts.is_dir():
        return []
    return sorted(
        (p for p in run.attempts.iterdir() if p.name.isdigit()), key=lambda p: int(p.name)
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
