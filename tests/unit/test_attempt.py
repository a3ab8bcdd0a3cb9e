"""One launcher has a run, and a dead one's run is taken over."""

import json
import os
import subprocess
import sys

import pytest

from qlora_dist import ends
from qlora_dist.attempt import own
from qlora_dist.errors import RunDirError
from qlora_dist.layout import RunDir
from qlora_dist.process import Process, start_ticks


@pytest.fixture
def run(tmp_path):
    (tmp_path / "attempts").mkdir()
    return RunDir(tmp_path)


def test_attempts_are_numbered_and_the_run_is_given_back(run):
    for number in range(3):
        with own(run) as attempt:
            assert attempt == number
            assert run.owner_json.exists()
        assert not run.owner_json.exists()


def test_a_second_launcher_is_refused(run):
    with own(run), pytest.raises(RunDirError, match="is already being run by process"), own(run):
        pass


def test_a_dead_launchers_run_is_taken_over(run):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ticks = start_ticks(child.pid)
    me = Process.this()
    owner = {"host": me.host, "boot_id": me.boot_id, "pid": child.pid, "start_ticks": ticks}
    run.owner_json.write_text(json.dumps(owner))
    with pytest.raises(RunDirError), own(run):
        pass
    child.kill()
    child.wait()
    with own(run) as attempt:
        assert attempt == 0


def test_a_reused_pid_is_another_process(run):
    me = Process.this()
    owner = {
        "host": me.host,
        "boot_id": me.boot_id,
        "pid": os.getpid(),
        "start_ticks": me.start_ticks - 1,
    }
    run.owner_json.write_text(json.dumps(owner))
    with own(run) as attempt:
        assert attempt == 0


def test_another_machines_launcher_is_never_taken_for_dead(run):
    owner = {"host": "elsewhere", "boot_id": "x", "pid": 1, "start_ticks": 1}
    run.owner_json.write_text(json.dumps(owner))
    with pytest.raises(RunDirError, match="belongs to process 1 on elsewhere"), own(run):
        pass


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((0, 0), 0),
        ((0, 85), 85),
        ((85, 86), 86),
        ((85, 1), 1),
        ((0, 139), 139),
        ((87, 1), 87),
        ((2, 87), 2),
        ((2, 93), 93),
        ((85, None), 1),
    ],
)
def test_the_worst_end_decides(tmp_path, codes, expected):
    for rank, code in enumerate(codes):
        if code is not None:
            path = tmp_path / f"{rank:05d}.json"
            ends.write_rank_end(path, rank=rank, code=code, cause=str(rank), step=3)
    found = ends.worst(ends.read_rank_ends(tmp_path, world_size=len(codes)))
    assert found.code == expected


def test_of_equal_failures_the_first_in_time_is_the_cause(tmp_path):
    for rank in (1, 0):
        path = tmp_path / f"{rank:05d}.json"
        ends.write_rank_end(path, rank=rank, code=1, cause=f"rank {rank}", step=0)
    assert ends.worst(ends.read_rank_ends(tmp_path, world_size=2)).cause == "rank 1"


def test_a_lost_connection_names_the_rank_that_left_no_word(tmp_path):
    lost = "RuntimeError: Connection closed by peer [127.0.0.1]:1"
    ends.write_rank_end(tmp_path / "00000.json", rank=0, code=ends.FAILED, cause=lost, step=3)
    cause = ends.worst(ends.read_rank_ends(tmp_path, world_size=3)).cause
    assert cause == f"{lost}; no word from rank 1, 2: killed, or crashed outside Python"
    ends.write_rank_end(tmp_path / "00000.json", rank=0, code=ends.FAILED, cause="a bug", step=3)
    assert ends.worst(ends.read_rank_ends(tmp_path, world_size=3)).cause == "a bug"
