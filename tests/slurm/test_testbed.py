"""The testbed is a Slurm: it runs, preempts and requeues jobs, and loses nodes."""

import time

import pytest

from qlora_testbed import Settings

# The first attempt waits to be ended; the next says so and ends.
WAITS_ONCE = """
echo attempt ${SLURM_RESTART_COUNT:-0}
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
srun bash -c 'echo running on $SLURMD_NODENAME; sleep 300'
"""

TWO_SESSIONS = """
tell() { trap "echo $1 told" USR1; echo $1 waits; while [ ! -e stop ]; do sleep 0.1; done; }
export -f tell
srun bash -c 'setsid bash -c "tell inner" & tell outer; wait'
"""


def test_both_partitions_have_two_idle_nodes(testbed):
    testbed.wait_idle()
    rows = testbed.run("sinfo", "--noheader", "--format=%P %D %t").splitlines()
    assert rows == ["low* 2 idle", "high 2 idle"]


def test_a_job_runs_on_two_nodes_and_its_output_comes_back(testbed, submit):
    job = submit(testbed, "srun printenv SLURMD_NODENAME", "--nodes=2")
    job.wait_for("COMPLETED")
    assert sorted(job.lines()) == ["n1", "n2"]


def test_a_preempted_job_is_requeued_and_runs_again(testbed, submit):
    low = submit(testbed, WAITS_ONCE, "--nodes=2")
    low.wait_for_line("attempt 0")
    high = submit(testbed, "true", "--nodes=2", "--partition=high", "--exclusive")
    high.wait_for("COMPLETED")
    low.wait_for("COMPLETED")
    assert low.field("Restarts") == "1"
    assert [line for line in low.lines() if line.startswith("attempt")] == [
        "attempt 0",
        "attempt 1",
    ]


def test_a_preempted_job_gets_its_signal_and_its_grace(testbed, submit, changed):
    changed(preempt_send_user_signal=True, grace_s=10)
    low = submit(
        testbed,
        "trap 'echo told; exit 0' USR1; echo ready; sleep 300 & wait",
        *("--nodes=2", "--signal=B:USR1@30"),
    )
    low.wait_for_line("ready")
    submit(testbed, "true", "--nodes=2", "--partition=high", "--exclusive")
    low.wait_for("COMPLETED", timeout_s=5)
    assert "told" in low.lines()


def test_where_jobs_are_not_requeued_a_job_may_still_ask(testbed, submit, changed):
    changed(job_requeue=False)
    assert submit(testbed, "true").field("Requeue") == "0"
    assert submit(testbed, "true", "--requeue").field("Requeue") == "1"


def test_jobs_of_a_lost_node_are_requeued(testbed, submit):
    job = submit(testbed, WAITS_ONCE, "--nodes=2")
    # Earlier, srun would fail because of the node, and the job with it.
    job.wait_for_line("running on n2")
    testbed.kill_node("n2")
    try:
        assert {found.node for found in testbed.processes()} == {"n1"}
        job.wait_for("PENDING")
    finally:
        testbed.start_node("n2")
    job.wait_for("COMPLETED")
    assert job.field("Restarts") == "1"


@pytest.mark.parametrize(("proctrack", "told"), [("linuxproc", True), ("pgid", False)])
def test_a_signal_reaches_a_process_in_a_session_of_its_own_under_linuxproc_only(
    testbed, submit, changed, tmp_path, proctrack, told
):
    changed(proctrack=proctrack)
    job = submit(testbed, TWO_SESSIONS)
    job.wait_for_line("outer waits")
    job.wait_for_line("inner waits")
    testbed.run("scancel", "--signal=USR1", job.id)
    job.wait_for_line("outer told")
    if told:
        job.wait_for_line("inner told")
    time.sleep(0.5)
    assert ("inner told" in job.lines()) == told
    # Under pgid the inner one would outlive a cancelled job, and the node be drained for it.
    (tmp_path / "stop").touch()
    testbed.wait_idle()


def test_accounting_knows_every_attempt_beside_a_testbed_without_it(testbed, submit, make):
    other = make(Settings(accounting=True, gpus_per_node=2))
    other.up()
    assert other.env != testbed.env
    low = submit(other, WAITS_ONCE, "--nodes=2")
    low.wait_for_line("attempt 0")
    high = submit(other, "true", "--nodes=2", "--partition=high", "--exclusive")
    low.wait_for("COMPLETED")
    for job, states in ((low, ["PREEMPTED", "COMPLETED"]), (high, ["COMPLETED"])):
        assert _sacct(other, job, len(states)) == states
    gpus = submit(other, "srun printenv CUDA_VISIBLE_DEVICES", "--nodes=1", "--gres=gpu:2")
    gpus.wait_for("COMPLETED")
    assert gpus.lines() == ["0,1"]
    assert testbed.run("sinfo", "--noheader", "--format=%t", "--partition=low").split() == ["idle"]


def _sacct(testbed, job, count):
    """States of a job's attempts; sacct lags slurmctld by some seconds."""
    deadline = time.monotonic() + 20
    while True:
        command = ("sacct", "-X", "--duplicates", "--noheader", "--parsable2", "--format=State")
        states = testbed.run(*command, f"--jobs={job.id}").splitlines()
        if len(states) == count and states[-1] == "COMPLETED":
            return states
        assert time.monotonic() < deadline, states
        time.sleep(0.2)
