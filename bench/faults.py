"""``make faults``: a run meets a fault at every moment, goes on, and is the unbroken run.

Each row is a real run of two processes on a tiny model. The fault is real too: a signal, an
exception, or a tmpfs that is filled to its last byte (which needs root, and is left out without).
``make faults SEED=n RANDOM=6`` draws runs that are broken twice, at random moments.
"""

import argparse
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from models import make_tiny_model

from qlora_dist.faults import BALLAST, MOMENTS
from qlora_dist.layout import RunDir
from qlora_dist.train.compare import differences, records

KINDS = ("sigterm", "sigkill", "exception", "full-disk")
STEPS, SAVE_EVERY, EVALUATE_EVERY = 10, 3, 4
# Moments that come often: at which time the fault strikes, so that there is something to lose.
COUNTS = {"accumulation": 8, "save-after": 2, "evaluation": 4} | {
    moment: 2 for moment in MOMENTS if moment.startswith("save-")
}
# How often a whole run comes to each moment, and the moments that rank 0 alone comes to.
TIMES = {"first-step": 10, "accumulation": 20, "evaluation": 8, "epoch-end": 2} | {
    moment: 5 for moment in MOMENTS if moment.startswith("save-")
}
RANK_0 = {moment for moment in MOMENTS if moment.startswith("save-")} - {"save-write"}
RANK_0 |= {"tokenising", "consolidation"}
DISK_BYTES = 4 << 20


@dataclass(frozen=True)
class Row:
    """One fault: ``moment[#count][@rank]=kind``."""

    moment: str
    kind: str
    count: int = 1
    rank: int = 0

    def __str__(self):
        return f"{self.moment}#{self.count}@{self.rank}={self.kind}"


def all_rows():
    """Every moment with every kind; the write stage of a save on the second rank too."""
    rows = [Row(m, k, COUNTS.get(m, 1)) for m in MOMENTS for k in KINDS]
    return rows + [Row("save-write", k, COUNTS["save-write"], rank=1) for k in KINDS]


class Faults:
    """Runs faults in a folder of its own.

    Args:
        folder: Empty; the tiny model, the data and the unbroken runs go there too.
    """

    def __init__(self, folder):
        self._folder = folder
        self._model = make_tiny_model(folder / "model")
        self._data = write_pairs(folder)
        self._whole = {}

    def whole(self, processes):
        """The unbroken run of so many processes."""
        if processes not in self._whole:
            config = self._config(self._folder / f"whole-{processes}", processes)
            code, output = self._qlora("run", config)
            assert code == 0, output
            self._whole[processes] = RunDir(self._folder / f"whole-{processes}")
        return self._whole[processes]

    def meet(self, row, processes=2):
        """Run into one fault, go on, and report.

        Returns:
            ``(passed, line)``.
        """
        if row.kind == "full-disk":
            with small_disk(self._folder / "disk") as disk:
                return self._meet([row], disk / "run", processes)
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            return self._meet([row], Path(name) / "run", processes)

    def meet_all(self, rows, processes):
        """The same with one fault after the other."""
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            return self._meet(rows, Path(name) / "run", processes)

    def _meet(self, rows, root, processes):
        run, command = RunDir(root), ("run", self._config(root, processes))
        codes, steps = [], []
        for row in rows:
            code, output = self._qlora(*command, fault=str(row), run=run)
            free(run)
            codes.append(code)
            steps.append(num_steps(run))
            command = ("resume", root)
        if code:
            code, output = self._qlora(*command)
        resumed = resume_points(run)
        lost, allowed = [], []
        for attempt, row in enumerate(rows):
            done = steps[attempt] if codes[attempt] else 0
            later = [step for number, step in sorted(resumed.items()) if number > attempt]
            lost.append(max(0, done - later[0]) if later else done)
            allowed.append(0 if row.kind == "sigterm" else done - surely_saved(done))
        different = ["did not finish"] if code else differences(self.whole(processes), run)
        line = "  ".join(
            [
                f"{', '.join(map(str, rows)):<34}",
                f"{'/'.join(map(str, codes)):>5}",
                f"{'/'.join(map(str, lost)):>5}",
                f"{'/'.join(map(str, allowed)):>7}",
                f"{'NO' if different else 'yes':>5}",
                *(f"\n    {difference}" for difference in different[:4]),
                *([f"\n    {output.strip()[-400:]}"] if code else []),
            ]
        )
        return not different and all(a <= b for a, b in zip(lost, allowed, strict=True)), line

    def _config(self, root, processes):
        spec = {
            "name": "faults",
            "run_dir": str(root),
            "seed": 7,
            "model": {"source": str(self._model), "dtype": "fp32", "gradient_checkpointing": False},
            "adapter": {"r": 4, "alpha": 8, "dropout": 0.1},
            "data": {
                "source": str(self._data),
                "format": "input-output",
                "max_tokens": 64,
                "validation_rows": 6,
            },
            "optimizer": {"kind": "adamw", "lr": 1e-3},
            "schedule": {"kind": "cosine", "steps": STEPS, "warmup_steps": 2},
            "batch": {"global_size": 8, "micro_size": 2},
            "strategy": {"kind": "ddp" if processes > 1 else "single"},
            "resources": {
                "gpus_per_node": 0,
                "processes_per_node": processes,
                "cpus_per_process": 1,
            },
            "checkpoint": {"every_steps": SAVE_EVERY},
            "evaluation": {"every_steps": EVALUATE_EVERY, "micro_size": 2},
        }
        path = self._folder / f"{root.parent.name}-{root.name}.yaml"
        path.write_text(json.dumps(spec), encoding="utf-8")
        return path

    def _qlora(self, *arguments, fault=None, run=None):
        """Run a command; a disk that it fills is freed once it has said that a save failed."""
        process = subprocess.Popen(
            [sys.executable, "-m", "qlora_launch.cli", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | ({"QLORA_FAULT": fault} if fault else {}),
        )
        output = []
        for line in process.stdout:
            output.append(line)
            if "NOT saved" in line and run is not None:
                free(run)
        return process.wait(), "".join(output)


def write_pairs(folder):
    """40 rows of input and output, of many lengths."""
    path = folder / "pairs.jsonl"
    rows = [
        {"input": f"Question {i} " + "what " * (i % 7), "output": "word " * (1 + i * 5 % 11)}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@contextlib.contextmanager
def small_disk(folder):
    """A file system of a few MB."""
    folder.mkdir()
    size = f"size={DISK_BYTES}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def free(run):
    """Give a filled disk its room back."""
    with contextlib.suppress(FileNotFoundError):
        (run.root / BALLAST).unlink()


def num_steps(run):
    """Steps that were complete when the run ended."""
    with contextlib.suppress(FileNotFoundError):
        return max((step for kind, step in records(run) if kind == "train"), default=0)
    return 0


def surely_saved(steps):
    """The newest step that must have been committed when so many steps were complete.

    The newest save that was due may still wait for the one before it, which may still be written.
    """
    due = [s for s in range(1, steps + 1) if s % SAVE_EVERY == 0 or s % EVALUATE_EVERY == 0]
    return due[-3] if len(due) > 2 else 0


def resume_points(run):
    """Attempt -> step that it began after, of those that came as far as that."""
    found = {}
    for log in run.attempts.glob("*/logs/run.log"):
        text = log.read_text(encoding="utf-8")
        match = re.search(r"resumed after step (\d+)", text)
        if match or "ready after" in text:
            found[int(log.parts[-3])] = int(match[1]) if match else 0
    return found


def draw(seed, count):
    """Schedules of two faults each."""
    rng = random.Random(seed)
    for _ in range(count):
        processes, rows = rng.choice([1, 2]), []
        for _ in range(2):
            moment = rng.choice(MOMENTS)
            kind = rng.choice([k for k in KINDS if k != "full-disk"])
            rank = 0 if moment in RANK_0 else rng.randrange(processes)
            rows.append(Row(moment, kind, rng.randint(1, TIMES.get(moment, 1)), rank))
        yield rows, processes


def main():
    """Print a table; the exit code says whether every row passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", type=int, default=0, metavar="N", help="draw N schedules")
    parser.add_argument("--only", default="", help="rows whose text holds this")
    args = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    begin, results = time.monotonic(), []
    print(f"{'fault: moment#count@rank=kind':<34}  {'exit':>5}  {'lost':>5}  {'allowed':>7}  equal")
    with tempfile.TemporaryDirectory() as name:
        faults = Faults(Path(name))
        if args.random:
            for rows, processes in draw(args.seed, args.random):
                results.append(faults.meet_all(rows, processes))
                print(results[-1][1], flush=True)
        else:
            for row in all_rows():
                if args.only not in str(row):
                    continue
                if row.kind == "full-disk" and os.geteuid() != 0:
                    print(f"{row!s:<34}  left out: mounting a small disk needs root")
                    continue
                results.append(faults.meet(row))
                print(results[-1][1], flush=True)
    passed = sum(good for good, _ in results)
    print(f"{passed} of {len(results)} passed in {time.monotonic() - begin:.0f} s")
    return 0 if passed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
