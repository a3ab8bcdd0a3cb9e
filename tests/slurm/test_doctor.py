"""What doctor says of a real Slurm is what that Slurm is set to, and what it then does."""

import json

import pytest

from qlora_dist.errors import QLoRAError
from qlora_testbed import Settings
from tests.conftest import run_qlora, write_config

pytestmark = pytest.mark.matrix

PROFILE = {"partition": "low", "mem_gb": 1, "signal_lead_s": 30}


@pytest.fixture
def doctor(testbed, tmp_path, tiny_model, pairs_file, monkeypatch):
    """Examine a config on the testbed, or on another; returns the findings, and the command."""

    def examine(on=testbed, *, site=None, code=0, **resources):
        for name, value in on.env.items():
            monkeypatch.setenv(name, value)
        profile = tmp_path / "site: 'a'.yaml"
        profile.write_text(json.dumps(PROFILE | (site or {})))
        changes = {
            "resources": {
                **{"nodes": 2, "gpus_per_node": 0, "processes_per_node": 1, "time": "0:10:00"},
                **resources,
            }
        }
        config = write_config(tmp_path, tiny_model, pairs_file, "run", changes)
        argv = ("doctor", config, "--cluster", profile)
        if code:
            return run_qlora(tmp_path, *argv, code=code)
        text = run_qlora(tmp_path, *argv).stdout
        found = json.loads(run_qlora(tmp_path, *argv, "--json").stdout)
        assert found["unknown"] == []
        # What decides, and how much it costs, is in the text for a person too.
        flat = " ".join(text.split())
        for finding in found["findings"]:
            assert " ".join(finding["what"].split()) in flat
        return found["findings"]

    return examine


def pick(findings, event, word=""):
    found = [f for f in findings if f["event"] == event and word in f["what"]]
    assert found, f"no {event} with {word!r} in {findings}"
    return found[0]


def decided_by(findings):
    return [by for finding in findings for by in finding["decided_by"]]


def shown(testbed, name):
    """A value as ``scontrol show config`` has it, read apart from the code that is tested."""
    for line in testbed.run("scontrol", "show", "config").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == name:
            return value.strip()
    raise AssertionError(name)


@pytest.mark.parametrize(
    ("settings", "has", "window"),
    [
        ({}, ["PreemptMode=REQUEUE of partition low"], "It has 5 s"),
        ({"grace_s": 10}, ["GraceTime=10 of partition low"], "It has 15 s"),
        ({"grace_s": 10, "kill_wait_s": 7}, ["KillWait=7"], "It has 17 s"),
        ({"preempt_send_user_signal": True, "grace_s": 10}, [], "(SIGUSR1)"),
        ({"preempt_mode": "CANCEL"}, ["PreemptMode=CANCEL of partition low"], "within KillWait"),
        ({"preempt_mode": "SUSPEND"}, ["PreemptMode=SUSPEND of partition low"], "goes on later"),
        ({"preempt_mode": "OFF"}, ["PreemptMode=OFF of partition low"], "are not preempted"),
    ],
)  # fmt: skip
def test_preemption_is_what_the_cluster_is_set_to(doctor, testbed, changed, settings, has, window):
    changed(**settings)
    finding = pick(doctor(), "preemption")
    assert window in finding["what"]
    assert set(has) <= set(finding["decided_by"])
    if testbed.settings.preempt_mode in ("REQUEUE", "CANCEL"):
        wait = shown(testbed, "KillWait").removesuffix(" sec")
        assert f"KillWait={wait}" in finding["decided_by"]


def test_the_other_settings_are_what_scontrol_shows(doctor, testbed, changed):
    before = decided_by(doctor())
    assert "JobRequeue=0" not in before
    assert not [by for by in before if by.startswith("ProctrackType")]
    changed(job_requeue=False, proctrack="pgid", cred_expire_s=9, slurmd_timeout_s=11)
    assert shown(testbed, "JobRequeue") == "0"
    assert shown(testbed, "ProctrackType") == "proctrack/pgid"
    after = decided_by(doctor())
    for by in (
        *("JobRequeue=0", "ProctrackType=proctrack/pgid", "AuthInfo cred_expire=9"),
        *("SlurmdTimeout=11", f"MinJobAge={shown(testbed, 'MinJobAge').removesuffix(' sec')}"),
    ):
        assert by in after, by


def test_accounting_and_qos_are_read_where_there_are_some(doctor, make):
    other = make(Settings(accounting=True))
    other.up()
    other.run("sacctmgr", "--immediate", "add", "qos", "scavenger", "GraceTime=120")
    found = doctor(other, site={"qos": "gold"})
    assert "AccountingStorageType=accounting_storage/none" not in decided_by(found)
    assert "scavenger" in pick(found, "submission", "There is no QOS gold")["decided_by"][0]


@pytest.mark.parametrize(
    ("options", "site", "resources", "fate"),
    [
        (["--time=2:00:00"], {}, {"time": "2:00:00"}, "waits for ever"),
        (["--nodes=4"], {}, {"nodes": 4}, "waits for ever"),
        (["--mem=9000"], {"mem_gb": 9}, {}, "sbatch refuses"),
        (["--constraint=a100"], {"constraint": "a100"}, {}, "sbatch refuses"),
        (["--gres=gpu:1"], {}, {"gpus_per_node": 1, "processes_per_node": None}, "sbatch refuses"),
        (["--cpus-per-task=9"], {}, {"cpus_per_process": 9}, "waits for ever"),
    ],
)
@pytest.mark.parametrize("enforce", ["NO", "ALL"])
def test_what_does_not_fit_meets_the_fate_that_was_foretold(
    doctor, testbed, changed, enforce, options, site, resources, fate
):
    """The real sbatch is asked afterwards."""
    changed(more=f"EnforcePartLimits={enforce}")
    fate = fate if enforce == "NO" else "sbatch refuses"
    assert fate in pick(doctor(site=site, **resources), "submission", fate)["what"]
    command = ["sbatch", "--parsable", "--nodes=1", "--mem=10", *options, "--wrap=true"]
    if fate == "sbatch refuses":
        with pytest.raises(QLoRAError, match="exit 1"):
            testbed.run(*command)
        return
    job = testbed.run(*command).strip()
    try:
        line = testbed.run("scontrol", "show", "job", "--oneliner", job)
        assert "JobState=PENDING" in line
        assert "Reason=PartitionConfig" in line or "Reason=PartitionTimeLimit" in line
    finally:
        testbed.run("scancel", job)


def test_exit_codes_that_slurm_requeues_itself_are_foretold(doctor, testbed, changed, submit):
    changed(more="RequeueExitHold=85")
    assert "comes back into the queue and is held" in pick(doctor(), "requeue", "held")["what"]
    job = submit(testbed, "exit 85", "--requeue")
    job.wait_for("SPECIAL_EXIT")


def test_a_cluster_that_does_not_answer_is_one_message(doctor, make):
    other = make()
    other.up()
    with other.controller_away():
        done = doctor(other, code=1)
    assert done.stdout == ""
    # Whichever is first, scontrol's patience or ours.
    assert done.stderr.startswith("qlora: scontrol ")
    assert done.stderr.count("\n") == 1


def test_a_cluster_that_was_taken_down_is_one_message(doctor, make):
    other = make()
    other.up()
    other.down()
    done = doctor(other, code=1)
    assert done.stdout == ""
    assert done.stderr.startswith("qlora: SLURM_CONF names ")
    assert done.stderr.count("\n") == 1


def test_a_partition_that_is_not_there_is_one_message(doctor):
    done = doctor(site={"partition": "nowhere"}, code=2)
    assert "'nowhere' is none of this cluster's; there are low, high" in done.stderr
