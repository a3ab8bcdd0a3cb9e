"""Slurm without a Slurm: the batch script, what Slurm answers, and the rule of requeueing."""

import json
import os
import shutil
import subprocess
from dataclasses import asdict, replace
from datetime import datetime

import pytest

from qlora_dist import ends
from qlora_dist.ends import RankEnd
from qlora_dist.errors import SpecError, UserError
from qlora_dist.files import write_json
from qlora_dist.layout import RunDir
from qlora_dist.ledger import bad_nodes, codes_without_progress
from qlora_dist.plan import make_plan
from qlora_dist.requeue import BUDGETS, decide
from qlora_dist.scheduler import (
    JobView,
    Queue,
    SchedulerError,
    SlurmJob,
    comment_of,
    parse_job,
    run_command,
)
from qlora_dist.spec_file import spec_from_tree
from qlora_launch.show_runs import list_text
from qlora_slurm.script import Job, batch_script
from qlora_slurm.site_profile import load_profile
from qlora_slurm.submit import SlurmBackend
from tests.unit.test_spec import GOOD

RUNNING = JobView("RUNNING", "None", restarts=0, requeue=True, nodes="n[1-2]")
JOB = SlurmJob("7", 0)


def make_end(code):
    return RankEnd(0, code, "cause", 5, 0.0)


@pytest.mark.parametrize(
    ("code", "view", "expected"),
    [
        (ends.DONE, RUNNING, "nothing"),
        (ends.USER_ERROR, RUNNING, "nothing"),
        (ends.NEVER_RESTART, RUNNING, "nothing"),
        *((code, RUNNING, "requeue") for code in BUDGETS),
        # A code that is nobody's, such as a crashed interpreter's.
        (139, RUNNING, "requeue"),
        # Requeued by Slurm or an administrator while the ranks were saving.
        (ends.PREEMPTED, JobView("COMPLETING", "None", 1, True, "n1"), "requeued"),
        (ends.PREEMPTED, JobView("PENDING", "BeginTime", 1, True, ""), "requeued"),
        # scancel: a requeue would bring it back to life.
        (ends.PREEMPTED, JobView("COMPLETING", "None", 0, True, "n1"), "nothing"),
        (ends.PREEMPTED, JobView("COMPLETING", "TimeLimit", 0, True, "n1"), "requeue"),
        # PreemptMode=CANCEL without a grace.
        (
            ends.PREEMPTED,
            JobView("COMPLETING", "None", 0, True, "n1", preempted=True),
            "requeue",
        ),
        (ends.PREEMPTED, JobView("RUNNING", "None", 0, False, "n1"), "new job"),
        # Slurm does not answer: a refused requeue costs nothing.
        (ends.PREEMPTED, None, "requeue"),
    ],
)
def test_what_follows_an_attempt(code, view, expected):
    decision = decide(make_end(code), JOB, view, idle=[code])
    assert decision.following == expected
    assert decision.why


def test_a_cancelled_run_is_not_requeued():
    end = make_end(ends.PREEMPTED)
    assert decide(end, JOB, RUNNING, idle=[85], cancelled=True).following == "nothing"


@pytest.mark.parametrize("code", BUDGETS)
def test_a_run_that_never_commits_a_step_is_given_up(code):
    """Each cause has a budget of its own; others in between spend none of it."""
    other = ends.FAILED if code != ends.FAILED else ends.HANG
    idle = [code] * (BUDGETS[code] - 1) + [other] * (BUDGETS[other] - 1)
    assert decide(make_end(code), JOB, RUNNING, idle=idle).following == "requeue"
    assert decide(make_end(code), JOB, RUNNING, idle=[*idle, code]).following == "nothing"


def test_a_second_failure_in_a_row_waits():
    end = make_end(ends.FAILED)
    assert decide(end, JOB, RUNNING, idle=[1]).wait_s == 0
    assert decide(end, JOB, RUNNING, idle=[1, 139]).wait_s == 60
    assert decide(end, JOB, RUNNING, idle=[1] * 4).wait_s == 960
    assert decide(make_end(ends.PREEMPTED), JOB, RUNNING, idle=[85, 85]).wait_s == 0


def test_nodes_are_bad_by_the_ledger(tmp_path):
    run = RunDir(tmp_path)
    cases = [(88, "n1"), (85, "n2"), (88, "n3"), (1, "n4")]
    for number, (code, node) in enumerate(cases):
        run.attempt(number).mkdir(parents=True)
        tree = {"end": {"code": code, "node": node}}
        (run.attempt(number) / "attempt.json").write_text(json.dumps(tree))
    assert bad_nodes(run) == {"n1", "n3"}


def test_attempts_without_progress_are_counted_back_to_the_last_committed_step(tmp_path):
    run = RunDir(tmp_path)
    for number, (code, step) in enumerate([(1, 0), (85, 0), (85, 5), (1, 5), (1, 5)]):
        run.attempt(number).mkdir(parents=True)
        tree = {"end": {"code": code}, "began_after": step}
        (run.attempt(number) / "attempt.json").write_text(json.dumps(tree))
    for number in (5, 6):
        run.attempt(number).mkdir()
        (run.attempt(number) / "attempt.json").write_text('{"began_after": 5}')
    # The newest is the caller's own; the one before was killed before it could say so.
    assert codes_without_progress(run, 5) == [85, 1, 1, 85]
    assert codes_without_progress(run, 6) == []


def test_an_answer_of_scontrol_is_read():
    text = (
        "JobId=7 JobName=a b UserId=root(0) JobState=RUNNING Reason=None Dependency=(null) "
        "Requeue=1 Restarts=2 BatchFlag=1 StartTime=Unknown EndTime=2026-11-22T10:00:00 "
        "NodeList=n[1-2] BatchHost=n1 Comment=qlora:/x=y JobState=FAILED z"
    )
    view = parse_job(text)
    assert replace(view, end_time=None) == JobView("RUNNING", "None", 2, True, "n[1-2]")
    assert view.end_time == datetime(2026, 11, 22, 10).timestamp()
    with pytest.raises(SchedulerError, match="lacks 'JobState'"):
        parse_job("slurm_load_jobs error")


@pytest.mark.parametrize(
    ("preempted", "started", "expected"),
    [
        ("None", "2026-11-22T10:00:00", False),
        ("2026-11-22T10:05:00", "2026-11-22T10:00:00", True),
        # In an execution before this one.
        ("2026-11-22T09:05:00", "2026-11-22T10:00:00", False),
        ("2026-11-22T09:05:00", "Unknown", False),
    ],
)
def test_a_preemption_is_one_of_this_execution(preempted, started, expected):
    text = (
        f"JobState=COMPLETING Reason=None Requeue=1 Restarts=2 StartTime={started} "
        f"EndTime=Unknown PreemptTime={preempted}"
    )
    assert parse_job(text).preempted is expected


def test_an_array_element_is_named_by_array_and_index():
    env = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}
    assert SlurmJob.this(env | {"SLURM_RESTART_COUNT": "2"}) == SlurmJob("9_3", 2)
    assert SlurmJob.this({"SLURM_JOB_ID": "9"}) == SlurmJob("9", 0)


def script(tmp_path, run_dir, profile="", time="1-02:30:00", runs=(), parallel=None):
    file = tmp_path / "site.yaml"
    file.write_text(profile)
    spec = spec_from_tree(
        {
            **GOOD,
            "run_dir": str(run_dir),
            "strategy": {"kind": "ddp"},
            "resources": {
                "backend": "slurm",
                "nodes": 2,
                "gpus_per_node": 4,
                "time": time,
                "profile": str(file),
            },
        }
    )
    return batch_script(Job(make_plan(spec), run_dir, runs or (run_dir,), parallel))


def test_the_script_says_what_the_spec_and_the_profile_say(tmp_path):
    text = script(
        tmp_path,
        tmp_path / "r",
        "partition: gpu\naccount: lab\nmem_gb: 1.5\nsignal_lead_s: 300\nnetwork_interface: ib0\n"
        "setup: [module load cuda]\nenv: {A: b c}\nsbatch: {nice: 100}\ngres: gpu:a100:4\n"
        "cpus: 32\nmail_user: me@lab\nlocal_dir: /local/$SLURM_JOB_ID\n",
    )
    for line in (
        *("--nodes=2", "--ntasks-per-node=1", "--gres=gpu:a100:4", "--time=1590", "--requeue"),
        *("--partition=gpu", "--account=lab", "--mem=1536M", "--signal=B:USR1@300"),
        *("--mail-user=me@lab", "--mail-type=END,FAIL", "--nice=100", "--cpus-per-task=32"),
    ):
        assert f"#SBATCH {line}\n" in text
    # The site has said it in its own words.
    assert "--gpus-per-node" not in text
    body = text.partition("# setup\n")[2].splitlines()
    assert body[0] == "trap '' TERM USR1 USR2"
    assert "export NCCL_SOCKET_IFNAME=ib0" in body
    # Each process puts in what its own machine says.
    assert "export QLORA_LOCAL_DIR='/local/$SLURM_JOB_ID'" in body
    assert body.index("export A='b c'") < body.index("module load cuda")
    assert body[-1].startswith("exec ")


def last_words(text, element=None):
    """What the script becomes, word by word, as bash reads it."""
    lines = text.splitlines()
    script = "\n".join([*lines[:-1], lines[-1].replace("exec ", "printf '%s\\n' ", 1)])
    env = {} if element is None else {"SLURM_ARRAY_TASK_ID": str(element)}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, env=os.environ | env
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "name", ["plain", "with space", "q'uote", 'd"quote', "$(touch hacked)", "`x`", "a;b&c", "中文"]
)
def test_scripts_with_nasty_names_are_sound_shell(tmp_path, name):
    """Bash reads the last command as three words and a path, whatever the path is."""
    run_dir = tmp_path / name
    text = script(tmp_path, run_dir)
    assert last_words(text)[1:] == ["-m", "qlora_dist.batch", "120", str(run_dir)]
    if shutil.which("shellcheck"):
        # SC2016 warns of the very quoting that keeps such names from running.
        check = ["shellcheck", "--exclude=SC2016", "-"]
        subprocess.run(check, input=text, text=True, check=True)


def test_a_sweep_is_one_array_that_knows_each_run(tmp_path):
    runs = (tmp_path / "lr-1e-4", tmp_path / "lr-2e-4")
    text = script(tmp_path, tmp_path, runs=runs, parallel=1)
    assert "#SBATCH --array=0-1%1\n" in text
    for element, run in enumerate(runs):
        assert last_words(text, element)[1:] == ["-m", "qlora_dist.batch", "120", str(run)]


def test_the_element_of_an_array_is_its_runs_job(tmp_path):
    for element, name in enumerate("ab"):
        (tmp_path / name / "control").mkdir(parents=True)
        RunDir(tmp_path / name).element_json.write_text(
            json.dumps({"sweep": "s2", "element": element})
        )
    first, second = comment_of(tmp_path, "s1"), comment_of(tmp_path, "s2")
    own = comment_of(tmp_path / "a")
    queue = Queue([("7_0", second), ("7_1", second), ("8", own), ("6_0", first), ("6_1", first)])
    assert queue.jobs_of(tmp_path / "a") == ["7_0", "8"]
    assert queue.jobs_of(tmp_path / "b") == ["7_1"]
    # Neither the sweep's folder nor a run that was never in it.
    assert queue.jobs_of(tmp_path) == queue.jobs_of(tmp_path / "c") == []
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert "8" in queue.jobs_of(tmp_path / "link")


@pytest.mark.parametrize(
    ("kind", "srun", "argv"),
    [
        (
            "apptainer",
            [],
            "apptainer exec --nv --bind {run}/r --bind {run}/corpora --bind {run} --bind /data/m "
            "--bind /x /i.sif python3",
        ),
        (
            "pyxis",
            [
                "--container-image=/i.sif",
                "--container-mounts={run}/r:{run}/r,{run}/corpora:{run}/corpora,{run}:{run},"
                "/data/m:/data/m,/x:/x",
            ],
            "python3",
        ),
    ],
)
def test_a_nodes_processes_run_in_a_container(tmp_path, kind, srun, argv, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    file = tmp_path / "site.yaml"
    file.write_text(f"container: {{kind: {kind}, image: /i.sif, binds: [/x]}}")
    resources = {"backend": "slurm", "gpus_per_node": 1, "profile": str(file)}
    tree = {**GOOD, "run_dir": str(tmp_path), "resources": resources}
    plan = make_plan(spec_from_tree(tree, ["model.source=/data/m", "model.shape=llama-7b"]))
    files = SlurmBackend().files(plan, tmp_path / "r")
    assert json.loads(files["container.json"]) == {
        "srun": [word.format(run=tmp_path) for word in srun],
        "argv": argv.format(run=tmp_path).split(),
    }


def test_a_time_limit_that_the_warning_uses_up_is_refused(tmp_path):
    with pytest.raises(UserError, match="use at least 0:14:00"):
        script(tmp_path, tmp_path / "r", "signal_lead_s: 700\n", time="0:05:00")


@pytest.mark.parametrize("option", ["comment: mine", "output: x", "exclusive: false"])
def test_a_profile_must_not_take_what_the_launcher_finds_its_jobs_by(tmp_path, option):
    with pytest.raises(SpecError, match=option.partition(":")[0]):
        script(tmp_path, tmp_path / "r", f"sbatch: {{{option}}}\n")


def test_a_run_dir_that_slurm_cannot_name_is_refused(tmp_path):
    with pytest.raises(UserError, match="Slurm cannot"):
        script(tmp_path, tmp_path / "50%")


def test_a_profile_that_is_not_one(tmp_path):
    with pytest.raises(UserError, match="there is no"):
        load_profile("no-such-cluster")
    file = tmp_path / "p.yaml"
    file.write_text("partitoin: gpu\n")
    with pytest.raises(SpecError, match="partitoin: no such key; did you mean partition"):
        load_profile(str(file))


def test_a_list_without_slurm_names_the_reason_once_a_run_and_knows_what_is_done(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    spec = spec_from_tree({**GOOD, "resources": {"backend": "slurm"}}, source="test")
    for name, code in (("ended", ends.DONE), ("waits", None)):
        run = RunDir(tmp_path / name)
        run.attempt(0).mkdir(parents=True)
        write_json(run.run_json, {"spec": spec.model_dump(mode="json")})
        tree = {"attempt": 0, "launcher": {"job": "7", "restart": 0}, "started_at": 1.0}
        end = (
            {}
            if code is None
            else {"ended_at": 2.0, "end": asdict(make_end(code)), "next": "nothing"}
        )
        write_json(run.attempt(0) / "attempt.json", {**tree, "began_after": 0, **end})
        run.control.mkdir()
        write_json(run.submitted_json, {"left_out": []})
    rows = list_text(tmp_path).splitlines()
    assert rows[1].split()[:2] == ["ended", "done"]
    assert rows[2].split()[:2] == ["waits", "unknown"]
    assert rows[2].endswith("squeue is not on this machine; run this where Slurm is")


def test_a_configuration_that_is_gone_is_said_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    with pytest.raises(SchedulerError, match=r"slurm\.conf, which is not there; unset it"):
        run_command("squeue")
