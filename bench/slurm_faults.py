"""``make slurm-faults``: jobs of a real Slurm meet every fault, in every pair of settings.

Each row is a run of two nodes that somebody submits, and nobody touches again: a fault strikes, and
the run has to end by itself as the unbroken run, bit for bit. Settings are drawn as a covering
array: any two of them meet in each of their combinations.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

from faults import write_pairs
from models import make_tiny_model
from slurm_strikes import FAULTS, STRIKE_AFTER, Fault, Struck, wait_until

from qlora_dist import ends
from qlora_dist.layout import RunDir, newest_attempt, open_run
from qlora_dist.ledger import standing
from qlora_dist.train.compare import differences, records
from qlora_testbed import Settings, Testbed

STEPS, SAVE_EVERY = 40, 10
# A save that was due may still be written when the next one is.
MOST_LOST = 2 * SAVE_EVERY
FACTORS = {
    "grace_s": (10, 0),
    "preempt_send_user_signal": (False, True),
    "proctrack": ("linuxproc", "pgid"),
    "job_requeue": (True, False),
    "accounting": (False, True),
}


class SlurmFaults:
    """Runs faults on a testbed.

    Args:
        testbed: Up, with two nodes.
        folder: Empty; the tiny model, the data and the unbroken run go there too.
    """

    def __init__(self, testbed: Testbed, folder: Path) -> None:
        # For this process too, which asks where runs stand.
        os.environ |= testbed.env
        self._testbed, self._folder = testbed, folder
        self._model, self._data = make_tiny_model(folder / "model"), write_pairs(folder)
        self._whole: RunDir | None = None

    @property
    def whole(self) -> RunDir:
        """The same run on this machine, unbroken."""
        if self._whole is None:
            root = self._folder / "whole"
            done = self._qlora("run", self._config(root, backend="local"))
            assert done.returncode == 0, done.stdout
            self._whole = RunDir(root)
        return self._whole

    def meet(self, name: str) -> tuple[bool, str]:
        """Submit a run, have it meet a fault, wait for its end, and report.

        Returns:
            ``(passed, line)``.
        """
        fault, whole = FAULTS[name], self.whole
        with tempfile.TemporaryDirectory(dir=self._folder) as root:
            run = RunDir(Path(root) / "a run")
            try:
                problems, facts = self._meet(fault, run, whole)
            finally:
                self._clear()
        left = [found.command for found in self._testbed.processes()]
        problems += [f"left running: {', '.join(left)}"] if left else []
        line = f"{name:<30}  {facts}  {'NO' if problems else 'yes':>4}"
        return not problems, line + "".join(f"\n    {problem}" for problem in problems)

    def _meet(self, fault: Fault, run: RunDir, whole: RunDir) -> tuple[list[str], str]:
        config = self._config(run.root, backend="slurm", spec=fault.spec, site=fault.site)
        done = self._qlora("submit", config, env=dict(fault.env))
        assert done.returncode == 0, done.stdout
        job = done.stdout.partition("submitted job ")[2].partition(":")[0]
        if not fault.early:
            wait_until(lambda: num_steps(run) >= STRIKE_AFTER or newest_attempt(run) == 1)
        begin = time.time()
        fault.strike(Struck(self._testbed, run, job))
        state = wait_until(lambda: ended(run))
        now = standing(*open_run(run.root))
        first, lost = now.attempts[0], sum(row.lost_steps for row in now.attempts)
        problems = [] if state == "done" else [f"ended as {state}: {now.detail}", *said(run)]
        if state == "done":
            problems += differences(whole, run)[:4]
        if fault.codes and first.code not in fault.codes:
            problems.append(f"the first attempt ended with {first.code}: {first.cause}")
        if lost > (0 if fault.lossless else MOST_LOST):
            problems.append(f"{lost} steps lost")
        problems += ledger_problems(run)
        return problems, (
            f"{len(now.attempts):>8}  {first.code or '-'!s:>4}  {first.following or '-':>9}  "
            f"{lost:>4}  {seconds_to(run, begin)}"
        )

    def _config(
        self, root: Path, *, backend: str, spec: tuple[Any, ...] = (), site: tuple[Any, ...] = ()
    ) -> Path:
        profile = root.parent / f"{root.name}-site.yaml"
        profile.write_text(
            json.dumps({"partition": "low", "mem_gb": 1, "signal_lead_s": 60, **dict(site)})
        )
        nodes = {"nodes": 2, "processes_per_node": 1, "time": "0:20:00", "profile": str(profile)}
        if backend == "local":
            nodes = {"nodes": 1, "processes_per_node": 2}
        tree: dict[str, Any] = {
            "name": "faults",
            "run_dir": str(root),
            "seed": 7,
            "model": {"source": str(self._model), "dtype": "fp32", "gradient_checkpointing": False},
            "adapter": {"r": 4, "alpha": 8, "dropout": 0.1},
            "data": {"source": str(self._data), "format": "input-output", "max_tokens": 64},
            "optimizer": {"kind": "adamw", "lr": 1e-3},
            "schedule": {"kind": "cosine", "steps": STEPS, "warmup_steps": 2},
            "batch": {"global_size": 32, "micro_size": 1},
            "strategy": {"kind": "ddp"},
            "resources": {"backend": backend, "gpus_per_node": 0, "cpus_per_process": 1, **nodes},
            "checkpoint": {"every_steps": SAVE_EVERY},
        }
        for key, value in spec:
            section, _, inner = key.partition("__")
            tree[section][inner] = value
        path = root.parent / f"{root.name}.yaml"
        path.write_text(json.dumps(tree))
        return path

    def _qlora(
        self, *arguments: object, env: dict[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "qlora_launch.cli", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | (env or {}),
            check=False,
        )

    def _clear(self) -> None:
        self._testbed.run("scancel", "--user=root")
        self._testbed.wait_idle(120)


def ledger_problems(run: RunDir) -> list[str]:
    """Where attempt.json files contradict one another."""
    problems, step = [], 0
    rows = standing(*open_run(run.root)).attempts
    for row in rows:
        if row.began_after < step or row.last_step < row.began_after:
            problems.append(f"ledger: attempt {row.number} {row.began_after} -> {row.last_step}")
        step = row.began_after
    if rows and (rows[-1].last_step, rows[-1].code) != (STEPS, ends.DONE):
        problems.append(f"ledger: the last attempt ended at {rows[-1].last_step}")
    return problems


def seconds_to(run: RunDir, begin: float) -> str:
    """From the fault to the first attempt's last word and to the second's start."""
    tree = json.loads((run.attempt(0) / "attempt.json").read_text())
    end = tree.get("ended_at")
    path = run.attempt(1) / "attempt.json"
    again = json.loads(path.read_text())["started_at"] if path.exists() else None
    texts = [f"{t - begin:6.1f}" if t and t > begin else "     -" for t in (end, again)]
    return "  ".join(texts)


def num_steps(run: RunDir) -> int:
    """Steps that metrics.jsonl has."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return max((step for kind, step in records(run) if kind == "train"), default=0)
    return 0


def ended(run: RunDir) -> str | None:
    """How a run stands that neither runs nor waits."""
    state = standing(*open_run(run.root)).state
    return state if state not in ("running", "queued", "unknown", "new") else None


def said(run: RunDir) -> list[str]:
    """The ends of everything that the job printed."""
    files = [*run.control.glob("slurm-*.out"), *sorted(run.attempts.glob("*/logs/*"))]
    return [f"--- {file.name}: {file.read_text(errors='replace')[-600:]}" for file in files]


def covering_array() -> list[dict[str, Any]]:
    """Few settings in which every pair of factors takes each pair of values; greedy."""
    names = list(FACTORS)
    rows = [dict(zip(names, values, strict=True)) for values in product(*FACTORS.values())]

    def pairs(row: dict[str, Any]) -> set[Any]:
        return {((a, row[a]), (b, row[b])) for a, b in combinations(names, 2)}

    missing = set().union(*(pairs(row) for row in rows))
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


def main() -> int:
    """Print a table; the exit code says whether every row passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", default=[""], nargs="+", help="faults whose names hold one of these"
    )
    parser.add_argument(
        "--settings", type=int, nargs="+", metavar="N", help="only these, counted from 1"
    )
    args = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    begin, results = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, row in enumerate(covering_array(), start=1):
            if args.settings is not None and number not in args.settings:
                continue
            print(f"{number}: ", end="")
            print(", ".join(f"{key}={value}" for key, value in row.items()))
            head = f"{'fault':<30}  attempts  code       next  lost   ended   again  back"
            print(head, flush=True)
            with Testbed(folder / f"slurm-{number}", replace(Settings(), **row)) as testbed:
                place = folder / f"runs-{number}"
                place.mkdir()
                before = dict(os.environ)
                faults = SlurmFaults(testbed, place)
                for fault in FAULTS:
                    if any(text in fault for text in args.only):
                        results.append(faults.meet(fault))
                        print(results[-1][1], flush=True)
                # The next testbed refuses to come up beside a cluster that is configured already.
                os.environ.clear()
                os.environ.update(before)
    passed = sum(good for good, _ in results)
    print(f"{passed} of {len(results)} passed in {time.monotonic() - begin:.0f} s")
    return 0 if passed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
