"""What the processes of a run tell one another while one works for long; how they end."""

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
from qlora_dist.process import leave
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
leave(0)
"""


def torchrun(script, *arguments):
    """The script's end, on two processes."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        + [str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


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
    done = torchrun(script, what)
    told = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert told == {0: expected, 1: expected}, done.stderr


# The last collective's tensor is large, so that its thread is still at it; and something refers to
# the group until the interpreter's end.
LEAVING = """
import sys, torch
import torch.distributed as dist
from qlora_dist.process import leave

dist.init_process_group("gloo")
sys.modules["kept"] = dist.group.WORLD
for _ in range(50):
    dist.all_reduce(torch.zeros(1_000_000), async_op=True).wait()
dist.destroy_process_group()
leave(0)
"""


def test_a_rank_whose_group_is_still_at_work_ends_well(tmp_path):
    # With sys.exit in leave's place, about every other run aborts.
    script = tmp_path / "script.py"
    script.write_text(LEAVING)
    for _ in range(4):
        done = torchrun(script)
        assert done.returncode == 0, done.stderr
