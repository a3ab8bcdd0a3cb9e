"""Where runs stand, as tables."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_dist.errors import RunDirError
from qlora_dist.layout import RunDir, open_run
from qlora_dist.ledger import Answer, AttemptRow, Standing, standing
from qlora_dist.scheduler import Queue, SchedulerError
from qlora_dist.spec import RunSpec


def status_text(run: RunDir, spec: RunSpec, now: Standing) -> str:
    """One run: its standing, then its attempts."""
    steps = f" of {spec.schedule.steps}" if spec.schedule.steps else ""
    lines = [
        f"{run.root}",
        f"  {now.state}: {now.detail}" if now.detail else f"  {now.state}",
        f"  committed step {now.step}{steps}" if now.step else f"  no step committed yet{steps}",
    ]
    if now.attempts:
        gpus = spec.resources.nodes * max(1, spec.resources.gpus_per_node)
        unit = "GPU" if spec.resources.gpus_per_node else "node"
        spent = sum(_seconds(row) for row in now.attempts) * gpus / 3600
        kept = sum(row.step_s for row in now.attempts) * gpus / 3600
        lines.append(
            f"  {spent:.2f} {unit}-hours: {kept:.2f} in steps that the run has "
            f"({now.goodput or 0:.0%}), {spent - kept:.2f} in starts, saves and lost steps"
        )
        lines += ["", *_table(_attempt_cells(now.attempts))]
    return "\n".join(lines)


def list_text(folder: Path) -> str:
    """Every run in a folder, a line each."""
    rows: list[Sequence[str]] = [("run", "state", "step", "of", "attempts", "detail")]
    queue: Answer | None = None
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            run, spec = open_run(path)
        except RunDirError:
            continue
        if queue is None and spec.resources.backend == "slurm":
            # Once for all: a controller that is away lets each question wait.
            try:
                queue = Queue.read()
            except SchedulerError as error:
                queue = error
        now = standing(run, spec, queue)
        steps = str(spec.schedule.steps or "")
        rows.append(
            (path.name, now.state, str(now.step), steps, str(len(now.attempts)), now.detail)
        )
    if len(rows) == 1:
        return f"no runs in {folder}"
    return "\n".join(_table(rows))


def status_json(now: Standing) -> dict[str, Any]:
    """The same for programs."""
    return asdict(now) | {"goodput": now.goodput}


def _attempt_cells(attempts: Sequence[AttemptRow]) -> list[Sequence[str]]:
    head = ("attempt", "where", "nodes", "started", "took", "steps", "lost", "end", "next")
    rows: list[Sequence[str]] = [head]
    for row in attempts:
        rows.append(
            (
                str(row.number),
                row.where,
                row.nodes,
                time.strftime("%m-%d %H:%M:%S", time.localtime(row.started_at)),
                f"{_seconds(row):.0f} s",
                f"{row.began_after} -> {row.last_step}",
                str(row.lost_steps),
                f"{'' if row.code is None else row.code} {row.cause}".strip() or "-",
                row.following,
            )
        )
    return rows


def _seconds(row: AttemptRow) -> float:
    return (row.ended_at or time.time()) - row.started_at


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
