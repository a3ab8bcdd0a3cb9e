"""``make bench-overhead``: what signs of life and the agreed stop cost, and what commands take.

The cost of a step's bookkeeping is that of its beats, of polling the stop file and of agreeing on a
flag; two processes do nothing else, so that neither waits for the other's work. Commands are run
in a folder of 100 runs.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults import write_pairs
from models import make_tiny_model

CALLS, STEP_S = 2000, 0.5
WORKER = """
import statistics, sys, time
from pathlib import Path
from qlora_dist.layout import RunDir
from qlora_dist.plan import Topology
from qlora_dist.process import leave
from qlora_dist.train.place import Place
from qlora_dist.train.preempt import StopRequest
from qlora_dist.train.pulse import Pulse
from qlora_dist.train.world import World
run, calls = RunDir(Path(sys.argv[1])), int(sys.argv[2])
place, pulse, stop = Place.from_env(), Pulse(), StopRequest()
stop.file = run.stop_file(0)
topology = Topology(nodes=1, processes_per_node=2, device="cpu")
pulse.start(run.beats(0) / f"{place.rank}.json")
world = World.start(place, topology, timeout_s=600, pulse=pulse)
times = {"beats": [], "beats, stop file, agreement": []}
for name in times:
    for step in range(calls):
        world.barrier()
        begin = time.perf_counter()
        pulse.at("training", step)
        if name != "beats":
            world.any(stop.here())
        times[name].append(time.perf_counter() - begin)
if place.rank == 0:
    for name, seconds in times.items():
        print(f"{name}|{statistics.median(seconds)}|{statistics.mean(seconds)}")
world.stop()
leave(0)
"""


def bookkeeping(folder):
    """Seconds of each part, median and mean."""
    (folder / "attempts" / "000" / "beats").mkdir(parents=True)
    (folder / "control").mkdir()
    script = folder / "worker.py"
    script.write_text(WORKER)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node=2", str(script), str(folder), str(CALLS)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        name, median, mean = line.split("|")
        yield name, float(median), float(mean)


def many_runs(folder):
    """100 runs that were done, copies of one."""
    spec = {
        "name": "one",
        "run_dir": str(folder / "runs" / "one"),
        "model": {"source": str(make_tiny_model(folder / "model")), "dtype": "fp32"},
        "data": {"source": str(write_pairs(folder)), "format": "input-output", "max_tokens": 64},
        "optimizer": {"kind": "adamw"},
        "schedule": {"steps": 8},
        "strategy": {"kind": "single"},
        "resources": {"gpus_per_node": 0, "cpus_per_process": 1},
    }
    config = folder / "one.yaml"
    config.write_text(json.dumps(spec))
    assert seconds_of("run", config)[1] == 0
    for number in range(99):
        shutil.copytree(folder / "runs" / "one", folder / "runs" / f"run-{number}")
    return config


def seconds_of(*arguments):
    """How long a command takes, and how it ends."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "qlora_launch.cli", *map(str, arguments)],
        capture_output=True,
        check=False,
    )
    return time.perf_counter() - begin, done.returncode


def main():
    """Print both tables."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"{'a micro-batch':<30}  median ms  mean ms  of a step of {STEP_S} s")
        for part, median, mean in bookkeeping(folder / "run"):
            print(f"{part:<30}  {median * 1e3:9.3f}  {mean * 1e3:7.3f}  {median / STEP_S:.3%}")
        config = many_runs(folder)
        rows = [("status RUN", "status", folder / "runs" / "one")]
        rows.append(("list, 100 runs", "list", folder / "runs"))
        if shutil.which("sbatch") and "SLURM_CONF" in os.environ:
            overrides = ["resources.time=0:10:00", f"run_dir={folder / 'queued'}"]
            rows.append(("submit", "submit", config, *overrides))
            rows.append(("status RUN, queued", "status", folder / "queued"))
            rows.append(("cancel", "cancel", folder / "queued"))
        print(f"\n{'command':<30}  seconds, median of 5")
        for text, *arguments in rows:
            times = 1 if text in ("submit", "cancel") else 5
            taken = [seconds_of(*arguments) for _ in range(times)]
            assert all(code == 0 for _, code in taken), text
            print(f"{text:<30}  {statistics.median(s for s, _ in taken):.2f}")


if __name__ == "__main__":
    main()
