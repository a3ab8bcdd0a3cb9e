"""What the processes of a run tell one another while one of them works for long."""

import json
import os
import subprocess
import sys

import pytest

# Each process prints one line: what on_rank_0 gave it.
SCRIPT = """
import json, os, sys, time
from qlora_dist.errors import DataError, QLoRAError
from qlora_dist.plan import Topology
from qlora_dist.train.place import Place
from qlora_dist.train.preempt import Preempted
from qlora_dist.train.world import World

what = sys.argv[1]
place = Place.from_env()
world = World.start(place, Topology(1, 2, "cpu"), timeout_s=3)


def work(check):
    if what == "fails":
        raise DataError("data.source: no")
    for _ in range(80):
        check()
        time.sleep(0.1)
    return {"made": 1}


def stop():
    return what == "stopped" and world.rank == 1


try:
    result = world.on_rank_0("work", work, stop)
except Preempted:
    result = "preempted"
except QLoRAError as error:
    result = [error.exit_code, str(error)]
if result == {"made": 1}:
    world.barrier()
# One write: two processes share the pipe.
os.write(1, (json.dumps([world.rank, result]) + "\\n").encode())
"""


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        # Eight seconds of work, where a collective would end after three.
        ("long", {"made": 1}),
        ("stopped", "preempted"),
        ("fails", [2, "data.source: no"]),
    ],
)
def test_the_others_wait_for_rank_0_and_learn_how_it_went(tmp_path, what, expected):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        + [str(script), what],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    told = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert told == {0: expected, 1: expected}, done.stderr
