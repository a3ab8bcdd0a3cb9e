"""Runs as jobs of a real Slurm: they end as the unbroken run, whatever the queue does to them."""

import json
import os
import signal
from pathlib import Path

import pytest

from qlora_dist.layout import newest_attempt, open_run
from qlora_dist.ledger import standing
from qlora_dist.train.compare import differences
from tests.conftest import run_qlora, write_config
from tests.slurm.conftest import said, state, steps, wait_until


def test_a_run_that_is_preempted_three_times_ends_as_the_unbroken_run(
    slurm, testbed, whole, tmp_path
):
    """Preemption by real jobs of a higher partition, SIGTERM only; nothing is typed in between."""
    run, done = slurm()
    assert "submitted job" in done.stdout
    for number in (1, 2, 3):
        wait_until(lambda: steps(run) >= 12 * number)  # noqa: B023
        testbed.run(
            *("sbatch", "-phigh", "-N2", "--exclusive"),
            *("--output=/dev/null", "--wrap=sleep 1"),
        )
        wait_until(lambda: newest_attempt(run) == number)  # noqa: B023
    wait_until(lambda: state(run) in ("done", "failed"))
    assert state(run) == "done", said(run)
    assert differences(whole, run) == []
    now = standing(*open_run(run.root))
    assert [row.code for row in now.attempts] == [85, 85, 85, 0]
    assert [row.lost_steps for row in now.attempts] == [0, 0, 0, 0]
    assert [row.following for row in now.attempts] == ["requeued"] * 3 + ["nothing"]
    assert now.attempts[-1].last_step == 60
    table = run_qlora(tmp_path, "status", run.root).stdout
    assert "done: trained to the last step" in table


def test_a_cancelled_run_saves_and_does_not_come_back(slurm, testbed, tmp_path):
    run, _ = slurm()
    wait_until(lambda: steps(run) >= 3)
    assert "saves and ends" in run_qlora(tmp_path, "cancel", run.root).stdout
    wait_until(lambda: state(run) == "stopped")
    testbed.wait_idle()
    now = standing(*open_run(run.root))
    assert len(now.attempts) == 1
    assert now.step == now.attempts[0].last_step >= 3
    assert now.attempts[0].following == "nothing"


def test_scancel_is_not_undone(slurm, testbed):
    run, done = slurm()
    wait_until(lambda: steps(run) >= 3)
    job = done.stdout.partition("submitted job ")[2].partition(":")[0]
    testbed.run("scancel", job)
    testbed.wait_idle()
    now = standing(*open_run(run.root))
    assert len(now.attempts) == 1
    assert now.attempts[0].following == "nothing", said(run)
    assert now.step == now.attempts[0].last_step


def test_a_job_keeps_its_code_and_sees_what_it_may(slurm, tmp_path, checkout, monkeypatch):
    """The checkout breaks while the job is in the queue's hands; nothing of the shell leaks."""
    secret = "hf" + "_AbCdEfGhIjKlMnOp"
    given = {"HF_TOKEN": secret, "LAB_NOTE": "battery staple", "SBATCH_TIMELIMIT": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    run, done = slurm(site={"env": {"SITE_NOTE": "a 'b'"}}, schedule__steps=30)
    assert "not used: SBATCH_TIMELIMIT" in done.stdout
    taken = json.loads(run.code_json.read_text())["sha256"]
    stages = checkout / "qlora_dist" / "train" / "stages.py"
    stages.write_text("raise SystemExit('edited')\n" + stages.read_text())
    refused = run_qlora(checkout, "resume", run.root, code=2)
    assert "is in the queue already, as job" in refused.stderr
    wait_until(lambda: run.checkpoints.is_dir() and steps(run) >= 22)
    rank = json.loads(run.rank_file(0, 1).read_text())["process"]["pid"]
    environ = Path(f"/proc/{rank}/environ").read_bytes().split(b"\0")
    assert b"SITE_NOTE=a 'b'" in environ
    assert not {name.encode() for name in given} & {line.partition(b"=")[0] for line in environ}
    os.kill(rank, signal.SIGKILL)
    wait_until(lambda: state(run) in ("done", "failed"))
    assert state(run) == "done", said(run)
    noted = [json.loads(path.read_text()) for path in sorted(run.attempts.glob("*/attempt.json"))]
    assert [tree["code"] for tree in noted] == [taken, taken]
    for attempt in (0, 1):
        environment = json.loads(run.environment_json(attempt).read_text())
        assert set(given) <= set(environment["left_out"])
        assert environment["variables"]["SITE_NOTE"] == "a 'b'"
    files = [path for path in run.root.rglob("*") if path.is_file()]
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_a_run_is_not_submitted_twice(slurm, testbed, tmp_path):
    run, _ = slurm()
    done = run_qlora(tmp_path, "resume", run.root, code=2)
    assert "is in the queue already, as job" in done.stderr
    assert testbed.run("squeue", "--noheader").count("\n") == 1


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ({"partition": "nowhere"}, "partition: 'nowhere' is none of this cluster's"),
        ({"mem_gb": 100_000}, "sbatch refused the job"),
    ],
)
def test_what_slurm_refuses_is_one_message(slurm, testbed, site, message):
    _, done = slurm(code=2, site=site)
    assert message in done.stderr
    assert testbed.run("squeue", "--noheader") == ""


def test_a_partition_that_takes_no_jobs_is_one_message_and_nothing_is_left(slurm, testbed):
    testbed.run("scontrol", "update", "PartitionName=low", "State=DRAIN")
    try:
        run, done = slurm(code=2)
    finally:
        testbed.run("scontrol", "update", "PartitionName=low", "State=UP")
    assert done.stderr.count("Required partition not available") == 1
    assert "qlora: sbatch refused the job: " in done.stderr
    assert testbed.run("squeue", "--noheader") == ""
    assert state(run) == "new"


def test_no_slurm_here(slurm, tmp_path, tiny_model, pairs_file, monkeypatch):
    config = write_config(tmp_path, tiny_model, pairs_file, "x", {})
    done = run_qlora(tmp_path, "submit", config, code=2, env={"PATH": "/nowhere"})
    assert "there is no sbatch on this machine" in done.stderr


def test_a_drill_has_slurm_requeue_a_run_and_sees_it_come_back(slurm, tmp_path):
    """Through the command that a user has, on the cluster's own terms."""
    _, done = slurm("drilled", code=0, verb=("drill", "--fault", "requeue", "--steps", "20"))
    assert "scontrol requeue" in done.stdout
    assert "requeue: the run came back exactly: 2 attempts, 0 steps taken again" in done.stdout
    assert "resumed after step 1" in done.stdout


@pytest.mark.matrix
def test_of_the_nodes_copies_of_a_base_only_the_damaged_one_is_removed(slurm, tmp_path):
    changes = {
        "site": {"local_dir": f"{tmp_path}/node-$SLURM_NODEID"},
        "quantization": {"kind": "nf4", "cache_dir": str(tmp_path / "nf4")},
        "strategy__kind": "fsdp",
    }
    first, _ = slurm("first", **changes)
    wait_until(lambda: state(first) == "done")
    copies = [next((tmp_path / f"node-{node}").iterdir()) for node in (0, 1)]
    files = [next(copy.glob("*.safetensors")) for copy in copies]
    inodes = [file.stat().st_ino for file in files]
    with files[1].open("r+b") as file:
        # In the second half of the last matrix's rows, which the second node reads.
        file.seek(files[1].stat().st_size - 100)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    second, _ = slurm("second", **changes)
    wait_until(lambda: state(second) == "done")
    log = second.run_log(newest_attempt(second)).read_text()
    assert f"{files[1]} changed after it was written, on" in log
    assert "quantising again" not in log
    assert files[0].stat().st_ino == inodes[0]
    assert not copies[1].exists()
    assert differences(first, second) == []
