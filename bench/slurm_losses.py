"""``make slurm-losses``: what doctor says a run can lose, written down first, and what it loses.

Each row is a real run as a job of a real Slurm (slurm/testbed, so root), met by a real event at a
bad moment. Doctor is asked while the run trains, before the event, with what the run has measured
until then; predictions.jsonl in the folder has its words, and when it said them.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from models import make_tiny_model

from qlora_dist.checkpoints import newest_step
from qlora_dist.layout import RunDir, newest_attempt, open_run
from qlora_dist.ledger import Measured, last_step, shortest_step_s
from qlora_dist.plan import make_plan
from qlora_slurm.ask import read_site
from qlora_slurm.case import Case
from qlora_slurm.doctor import diagnose
from qlora_slurm.site_profile import load_profile
from qlora_testbed import Settings, Testbed

# Steps of about a quarter of a second, so a save every five seconds.
EVERY = 20
PATIENCE_S = 480


def preempt(testbed, _job):
    """A job of the higher partition wants both nodes."""
    testbed.run("sbatch", "-phigh", "-N2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def lose_second(testbed, _job):
    """The second node fails."""
    testbed.kill_node("n2")


def lose_first(testbed, _job):
    """The first node fails, with the batch process."""
    testbed.kill_node("n1")


def scancel(testbed, job):
    """A user ends the job, with Slurm's own command."""
    testbed.run("scancel", job)


def wait(_testbed, _job):
    """Nothing is done: the time limit comes."""


@dataclass(frozen=True)
class Trial:
    """One run and what it meets.

    Attributes:
        event: Of the finding that is put to the test, and a word of its text.
        slow_s: How long storage makes each save take; 0 for what it takes by itself.
        comes_back: Whether the job is to go on by itself; None where Slurm may be quicker or not.
    """

    name: str
    event: tuple[str, str]
    cause: Callable
    settings: Settings = field(default_factory=Settings)
    site: dict = field(default_factory=dict)
    slow_s: int = 0
    time: str = "0:20:00"
    comes_back: bool | None = True


PREEMPTION, NODE, LIMIT = ("preemption", ""), ("node failure", ""), ("time limit", "")
TRIALS = (
    Trial("preempted, GraceTime=10", PREEMPTION, preempt, Settings(grace_s=10)),
    Trial("preempted, GraceTime=0", PREEMPTION, preempt),
    Trial(
        "preempted, GraceTime=30, CANCEL",
        PREEMPTION,
        preempt,
        Settings(grace_s=30, preempt_mode="CANCEL"),
    ),
    Trial(
        "preempted, GraceTime=0, CANCEL",
        PREEMPTION,
        preempt,
        Settings(preempt_mode="CANCEL"),
    ),
    Trial(
        "preempted, GraceTime=0, KillWait=2, save of 6 s",
        PREEMPTION,
        preempt,
        Settings(kill_wait_s=2),
        slow_s=6,
    ),
    Trial(
        "preempted, GraceTime=10, save of 20 s",
        PREEMPTION,
        preempt,
        Settings(grace_s=10),
        slow_s=20,
    ),
    # torchrun would kill whoever still saves 30 s after a SIGTERM of its own.
    Trial(
        "preempted, GraceTime=90, save of 35 s",
        PREEMPTION,
        preempt,
        Settings(grace_s=90),
        slow_s=35,
    ),
    Trial("second node killed", NODE, lose_second),
    Trial("first node killed", NODE, lose_first),
    Trial(
        "scancel, KillWait=2, save of 6 s",
        ("cancel", "scancel"),
        scancel,
        Settings(kill_wait_s=2),
        slow_s=6,
        comes_back=False,
    ),
    Trial(
        "time limit, signal_lead_s=1, save of 75 s",
        LIMIT,
        wait,
        Settings(kill_wait_s=2),
        {"signal_lead_s": 1},
        slow_s=75,
        # Until its first save has ended, a run does not know how long one takes.
        time="0:06:00",
        comes_back=None,
    ),
)


@dataclass(frozen=True)
class Row:
    """Predicted and seen, beside each other.

    Attributes:
        predicted: Steps that doctor said can be lost at most.
        seen: Steps that were complete, and are not in the run when it goes on.
        back: Whether the job went on by itself.
        right: Whether predicted and seen agree: nothing where nothing was predicted, and else
            something, for the moment is a bad one, and no more than predicted.
    """

    name: str
    predicted: int
    seen: int
    back: bool
    right: bool

    def __str__(self):
        words = "yes" if self.right else "NO"
        back = "yes" if self.back else "no"
        return f"{self.name:<48}  {self.predicted:>9}  {self.seen:>4}  {back:>4}  {words:>5}"


HEAD = f"{'what happens':<48}  {'predicted':>9}  {'seen':>4}  {'back':>4}  {'right':>5}"


class Losses:
    """Runs trials in a folder of its own."""

    def __init__(self, folder):
        self._folder = folder
        self._model = make_tiny_model(folder / "model")
        self._data = folder / "pairs.jsonl"
        rows = [
            {"input": f"Question {i} " + "what " * (i % 7), "output": "word " * (1 + i * 5 % 11)}
            for i in range(40)
        ]
        self._data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def meet(self, trial):
        """Submit a run, have doctor predict, let the event happen, and count."""
        folder = self._folder / re.sub(r"\W+", "-", trial.name)
        folder.mkdir()
        with Testbed(folder / "slurm", trial.settings) as testbed:
            os.environ.update(testbed.env)
            try:
                return self._meet(trial, testbed, folder)
            finally:
                testbed.run("scancel", "--user=root")
                for name in testbed.env:
                    del os.environ[name]

    def _meet(self, trial, testbed, folder):
        run, job = self._submit(trial, folder)
        until(lambda: saves(run), run)
        case = case_of(run)
        predicted = self._predict(trial, case)
        # Just before a save is due; or while one is written, where that takes long.
        moment = 2 * EVERY - 3
        if trial.slow_s:
            moment = 2 * EVERY + min(EVERY - 4, round(trial.slow_s / 2 / case.step_s))
        until(lambda: last_step(run, 0) >= moment or trial.cause is wait, run)
        trial.cause(testbed, job)
        done, back = self._watch(trial, testbed, run, job)
        kept = resumed_after(run) if back else newest_step(run.checkpoints)
        seen = done - kept
        right = trial.comes_back in (back, None) and (
            0 < seen <= predicted if predicted else seen == 0
        )
        return Row(trial.name, predicted, seen, back, right)

    def _watch(self, trial, testbed, run, job):
        """Follow the run until it goes on, or is over; steps that its first attempt completed."""
        done, deadline = 0, time.monotonic() + PATIENCE_S
        while resumed_after(run) is None:
            done = max(done, last_step(run, 0))
            state = state_of(testbed, job)
            for name in {"n1", "n2"} - set(testbed.alive()):
                if state == "PENDING":
                    testbed.start_node(name)
            if state in ("PREEMPTED", "CANCELLED", "TIMEOUT", "FAILED", "NODE_FAIL", "COMPLETED"):
                return max(done, last_step(run, 0)), False
            if time.monotonic() > deadline:
                raise TimeoutError(f"{trial.name}: {state}\n{said(run)}")
            time.sleep(0.05)
        return done, True

    def _predict(self, trial, case):
        event, word = trial.event
        finding = next(f for f in diagnose(case) if f.event == event and word in f.what)
        line = {"at": time.time(), "trial": trial.name, "measured": asdict(case.measured)}
        line |= {"step_s": case.step_s, "finding": asdict(finding)}
        with (self._folder / "predictions.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return finding.can_lose

    def _submit(self, trial, folder):
        profile = {"partition": "low", "mem_gb": 1, "signal_lead_s": 30, **trial.site}
        if trial.slow_s:
            profile["env"] = {"QLORA_FAULT": f"save-write=slow:{trial.slow_s}"}
        (folder / "site.yaml").write_text(json.dumps(profile), encoding="utf-8")
        spec = {
            "name": "losses",
            "run_dir": str(folder / "run"),
            "seed": 7,
            "model": {"source": str(self._model), "dtype": "fp32", "gradient_checkpointing": False},
            "adapter": {"r": 4, "alpha": 8},
            "data": {"source": str(self._data), "format": "input-output", "max_tokens": 64},
            "optimizer": {"kind": "adamw", "lr": 1e-3},
            "schedule": {"kind": "constant", "steps": 5000},
            "batch": {"global_size": 32, "micro_size": 1},
            "strategy": {"kind": "ddp"},
            "resources": {
                "nodes": 2,
                "gpus_per_node": 0,
                "processes_per_node": 1,
                "cpus_per_process": 1,
                "time": trial.time,
                "profile": str(folder / "site.yaml"),
            },
            "checkpoint": {"every_steps": EVERY},
        }
        (folder / "run.yaml").write_text(json.dumps(spec), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "qlora_launch.cli", "submit", str(folder / "run.yaml")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return RunDir(folder / "run"), re.search(r"submitted job (\d+)", done.stdout)[1]


def case_of(run):
    """What doctor knows of a run on the cluster that it is on."""
    _, spec = open_run(run.root)
    profile, plan = load_profile(spec.resources.profile), make_plan(spec)
    lines = run.metrics.read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines if line.endswith("}")]
    # No micro-step is longer than the longest step.
    micro_s = max(step["step_s"] for step in steps if step["kind"] == "train")
    measured = Measured(micro_s, max(saves(run)))
    return Case(read_site(profile.partition), plan, profile, measured, shortest_step_s(run))


def saves(run):
    """Seconds that each committed save of the first attempt took."""
    try:
        text = run.run_log(0).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [float(s) for s in re.findall(r"checkpoint committed after ([\d.]+) s", text)]


def resumed_after(run):
    """Step that a second attempt goes on from; None before there is one."""
    if not newest_attempt(run):
        return None
    try:
        text = run.run_log(1).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    if match := re.search(r"resumed after step (\d+)", text):
        return int(match[1])
    return 0 if "ready after" in text else None


def state_of(testbed, job):
    """JobState, as scontrol has it."""
    line = testbed.run("scontrol", "show", "job", "--oneliner", job)
    return re.search(r"JobState=(\w+)", line)[1]


def until(condition, run):
    """Wait, and say what the run said if it takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(said(run))
        time.sleep(0.05)


def said(run):
    """The end of everything that a run has printed."""
    files = [*run.control.glob("slurm-*.out"), *run.attempts.glob("*/logs/*")]
    return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-1500:]}" for file in files)


def main():
    """Print a table; the exit code says whether every prediction was right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--folder", type=Path, help="new folder that runs and predictions stay in")
    args = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    begin, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        folder.mkdir(exist_ok=True)
        losses = Losses(folder)
        print(HEAD, flush=True)
        for trial in TRIALS:
            if args.only in trial.name:
                rows.append(losses.meet(trial))
                print(rows[-1], flush=True)
    right = sum(row.right for row in rows)
    print(f"{right} of {len(rows)} predictions right, in {time.monotonic() - begin:.0f} s")
    return 0 if right == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
