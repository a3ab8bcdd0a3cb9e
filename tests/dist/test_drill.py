"""A drill does a real fault to a run of the user's, and says truly whether it came back."""

import json

from qlora_dist.layout import RunDir


def test_a_run_that_is_killed_comes_back_exactly(config, qlora, tmp_path):
    path = config("mine", schedule__steps=None, schedule__epochs=3)
    done = qlora("drill", path, "--fault", "sigkill", "--steps", "8")
    assert "sigkill: the run came back exactly: 2 attempts" in done.stdout
    struck = RunDir(tmp_path / "mine-drill" / "sigkill")
    first = json.loads((struck.attempt(0) / "attempt.json").read_text())
    assert first["end"]["code"] == 1
    # Between two saves, so that there is something to take again.
    assert first["last_step"] == 5
    assert "1 steps taken again" in done.stdout
    assert not (tmp_path / "mine").exists()
    again = qlora("drill", path, "--fault", "sigkill", "--steps", "8", code=2)
    assert "is there from an earlier drill" in again.stderr


def test_slurms_faults_want_slurm(config, qlora):
    done = qlora("drill", config(), "--fault", "requeue", code=2)
    assert "use resources.backend=slurm" in done.stderr
