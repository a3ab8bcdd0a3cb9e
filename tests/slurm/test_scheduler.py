"""What is asked of Slurm, by a real one."""

from qlora_dist.scheduler import follow_instead


def test_a_job_that_waits_for_another_waits_for_the_one_that_continues_it(
    testbed, submit, monkeypatch
):
    for name, value in testbed.env.items():
        monkeypatch.setenv(name, value)
    old, other, new = (submit(testbed, "sleep 60", "--hold").id for _ in range(3))
    waits = submit(testbed, "true", f"--dependency=afterok:{old}:{other}")
    array = submit(testbed, "true", "--array=0-1", f"--dependency=afterok:{old}")
    apart = submit(testbed, "true", f"--dependency=afterok:{other},afterany:{old}")
    follow_instead(old, new)
    state = "(unfulfilled)"
    assert waits.field("Dependency") == f"afterok:{new}{state},afterok:{other}{state}"
    assert array.field("Dependency") == f"afterok:{new}{state}"
    assert apart.field("Dependency") == f"afterok:{other}{state},afterany:{old}{state}"
