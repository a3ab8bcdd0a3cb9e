"""What a job's batch process does with a Slurm that refuses, is away, or has been faster."""

import json
import os
import stat

import pytest

from qlora_dist import batch
from qlora_dist.layout import RunDir
from qlora_dist.requeue import Decision
from qlora_dist.scheduler import SlurmJob

JOB = SlurmJob("7", 0)
SHOWN = "JobState={state} Reason=None Requeue={requeue} Restarts={restarts} Partition=low"
AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Programs that answer from a list, the last answer for good, and note what they were asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    calls = tmp_path / "calls"
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(batch, "_WAITS_S", (0, 0))

    def answer(program, verb, *answers):
        """Each answer is an exit code and what is printed, on standard error if it failed."""
        (folder / f"{program}.{verb}.json").write_text(json.dumps(answers))
        path = folder / program
        path.write_text(
            f"""#!/usr/bin/env python3
import json, sys, pathlib
folder = pathlib.Path({str(folder)!r})
verb = sys.argv[1] if {program!r} == "scontrol" else "any"
with open({str(calls)!r}, "a") as file:
    file.write({program!r} + " " + " ".join(sys.argv[1:]) + "\\n")
path = folder / f"{program}.{{verb}}.json"
answers = json.loads(path.read_text())
code, text = answers.pop(0) if len(answers) > 1 else answers[0]
path.write_text(json.dumps(answers or [[code, text]]))
print(text, file=sys.stderr if code else sys.stdout)
sys.exit(code)
"""
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    answer.calls = lambda: calls.read_text().splitlines() if calls.exists() else []
    return answer


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run" / "control").mkdir(parents=True)
    run = RunDir(tmp_path / "run")
    run.command_json.write_text("{}")
    return run


def shown(state="RUNNING", restarts=0, requeue=1):
    return [0, SHOWN.format(state=state, restarts=restarts, requeue=requeue)]


def test_a_controller_that_is_away_is_asked_again(slurm, run):
    slurm("scontrol", "requeue", [1, AWAY], [1, AWAY], [0, ""])
    slurm("scontrol", "show", [1, AWAY])
    assert batch._follow(run, JOB, Decision("requeue", ""), 85) == 85
    asked = [line for line in slurm.calls() if "requeue" in line]
    assert asked == ["scontrol requeue 7"] * 3


def test_a_controller_that_never_answers_is_a_failure(slurm, run):
    slurm("scontrol", "requeue", [1, AWAY])
    slurm("scontrol", "show", [1, AWAY])
    assert batch._follow(run, JOB, Decision("requeue", ""), 85) == 1


def test_a_job_that_slurm_has_requeued_meanwhile_is_not_submitted_again(slurm, run):
    slurm("scontrol", "requeue", [1, "Job is pending execution"])
    slurm("scontrol", "show", shown("PENDING", restarts=1))
    slurm("sbatch", "any", [0, "8"])
    assert batch._follow(run, JOB, Decision("requeue", ""), 85) == 85
    assert not [line for line in slurm.calls() if line.startswith("sbatch")]


def test_a_job_that_may_not_be_requeued_is_submitted_anew_once(slurm, run):
    slurm("scontrol", "requeue", [1, "Requested operation is presently disabled for job 7"])
    slurm("scontrol", "show", shown(requeue=0))
    slurm("scontrol", "write", [0, "#!/bin/bash"])
    slurm("sbatch", "any", [0, "8"])
    decision = Decision("requeue", "", wait_s=60, exclude=["n3", "n4"])
    assert batch._follow(run, JOB, decision, 85) == 85
    (sent,) = [line for line in slurm.calls() if line.startswith("sbatch")]
    assert sent == "sbatch --parsable --dependency=afterany:7 --begin=now+60 --exclude=n3,n4"


def test_a_cancel_that_comes_last_holds(slurm, run):
    run.cancel_file.touch()
    assert batch._follow(run, JOB, Decision("requeue", ""), 85) == 85
    assert slurm.calls() == []


def test_a_disk_that_is_full_changes_nothing_of_what_follows(run, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(batch, "note_end", full)
    end, decision = batch._not_run(0, "x"), Decision("requeue", "")
    assert batch._note(run, 0, end, decision) == (end, decision)
    assert "full" in capsys.readouterr().err


def test_storage_that_is_away_for_a_moment_is_waited_for(monkeypatch):
    monkeypatch.setattr(batch, "_WAITS_S", (0, 0))
    answers = [OSError(116, "Stale file handle"), OSError(5, "Input/output error"), "begun"]

    def begin():
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert batch._patiently(begin) == "begun"


@pytest.mark.parametrize(
    ("requeue", "mode", "preempted"),
    [(1, "REQUEUE", False), (1, "CANCEL", True), (0, "REQUEUE", True)],
)
def test_an_end_in_a_preemption_is_its_doing_where_slurm_would_not_requeue(
    slurm, requeue, mode, preempted
):
    times = "StartTime=2026-11-22T10:00:00 PreemptTime=2026-11-22T10:05:00"
    slurm(
        "scontrol",
        "show",
        [0, f"{SHOWN.format(state='COMPLETING', requeue=requeue, restarts=0)} {times}"],
        [0, f"PartitionName=low PreemptMode={mode}"],
    )
    assert batch._ask(JOB).preempted is preempted
