"""The doctor without a Slurm: what its programs print, and what follows for a run."""

import json
import math
from dataclasses import replace

import pytest

from qlora_dist.diagnosis import Diagnosis, lead_s, most_lost_steps, stop_s
from qlora_dist.errors import UserError
from qlora_dist.ledger import Measured
from qlora_dist.plan import make_plan
from qlora_dist.scheduler import SchedulerError
from qlora_dist.spec_file import spec_from_tree
from qlora_launch.doctor import examine
from qlora_launch.show_doctor import doctor_json, doctor_text
from qlora_slurm import site_text
from qlora_slurm.ask import read_site
from qlora_slurm.case import Case, duration
from qlora_slurm.doctor import diagnose
from qlora_slurm.site_facts import Site
from qlora_slurm.site_profile import Profile
from tests.unit.test_site_text import DATA, text
from tests.unit.test_spec import GOOD

APART = "high|n9|4|1|(null)|a|idle\nlow|n1|4|1|(null)|a|idle"
QUICK, SLOW = Measured(micro_s=0.5, save_s=1.0), Measured(micro_s=0.5, save_s=30.0)


def site(name="", *, config=None, partition=None, **changes):
    """The captured site; fields of its configuration, its `low` partition or its own changed."""
    low, high = site_text.parse_partitions(text(f"partitions{name}"))
    return replace(
        Site(
            config=replace(site_text.parse_config(text(f"config{name}")), **(config or {})),
            partitions=(replace(low, **(partition or {})),),
            others=(high,),
            nodes=site_text.parse_nodes(text("nodes")),
            qos=site_text.parse_qos(text("qos")) if not name else None,
            unknown=(),
        ),
        **changes,
    )


def case(
    where=None, measured=None, *, profile=None, step_s=1.0, every=100, steps=5000, **resources
):
    spec = {
        **GOOD,
        "strategy": {"kind": "ddp"},
        "schedule": {"kind": "constant", "steps": steps},
        "checkpoint": {"every_steps": every},
        "resources": {
            **{"backend": "slurm", "nodes": 2, "gpus_per_node": 2, "time": "1:00:00"},
            **resources,
        },
    }
    profile = Profile(mem_gb=1, **(profile or {}))
    return Case(where or site(), make_plan(spec_from_tree(spec)), profile, measured, step_s)


def find(a_case, event, word=""):
    found = [f for f in diagnose(a_case) if f.event == event and word in f.what]
    assert found, f"no {event} with {word!r}"
    return found[0]


def test_what_the_configuration_lacks_is_unknown_and_not_guessed():
    lines = [line for line in text("config").splitlines() if not line.startswith("KillWait")]
    config = site_text.parse_config("\n".join(lines))
    assert site_text.lacking(config) == ["kill_wait_s"]
    finding = find(case(replace(site(), config=config), QUICK), "preemption")
    assert finding.can_lose == 102
    assert "not known" in finding.what
    assert "KillWait=unknown" in finding.decided_by


def test_a_duration_is_written_as_a_config_has_it():
    assert [duration(s) for s in (59, 3600, 90061)] == ["0:00:59", "1:00:00", "1-1:01:01"]


@pytest.mark.parametrize(
    ("save_s", "step_s", "expected"),
    [(None, None, 200), (2.0, None, 200), (2.0, 1.0, 103), (0.1, 1.0, 102), (500.0, 1.0, 200)],
)
def test_at_most_two_save_intervals_are_lost(save_s, step_s, expected):
    measured = None if save_s is None else Measured(0.5, save_s)
    assert most_lost_steps(100, measured, step_s) == expected


def test_a_stop_waits_for_the_save_that_is_on_its_way():
    assert stop_s(QUICK) == 1 + 0.5 + 2 * 1.0
    assert lead_s(QUICK) == 10


def test_a_grace_that_covers_a_stop_loses_nothing_and_one_that_does_not_an_interval():
    grace = find(case(measured=QUICK), "preemption")
    assert grace.can_lose == 0
    assert "It has 15 s for a stop, which takes up to 3.5 s: nothing is lost" in grace.what
    assert grace.decided_by[:2] == (
        "PreemptMode=REQUEUE of partition low",
        "GraceTime=10 of partition low",
    )
    slow = find(case(measured=SLOW), "preemption")
    assert slow.can_lose == 131
    assert slow.change[0] == "ask the administrator for GraceTime=57 of partition low"
    assert slow.change[1].startswith("checkpoint.every_steps=60 instead of 100 loses 91 steps")


@pytest.mark.parametrize(("kill_wait_s", "lost"), [(3, 102), (4, 0)])
def test_without_grace_kill_wait_decides(kill_wait_s, lost):
    where = site(partition={"grace_s": 0}, config={"kill_wait_s": kill_wait_s})
    finding = find(case(where, QUICK), "preemption")
    assert finding.can_lose == lost
    assert finding.decided_by[-1] == f"KillWait={kill_wait_s}"


def test_before_anything_is_measured_the_bound_is_two_save_intervals_or_the_whole_run():
    assert find(case(), "preemption").can_lose == 200
    assert find(case(steps=30), "preemption").can_lose == 30


@pytest.mark.parametrize(
    ("partition", "measured", "words", "changes"),
    [
        ({"grace_s": 0}, QUICK, "ended within KillWait", 3),
        ({"grace_s": 10}, QUICK, "its batch process does", 0),
        ({"grace_s": 9}, QUICK, "its batch process does", 3),
    ],
)
def test_a_cancelling_partition_brings_the_run_back_only_within_the_grace(
    partition, measured, words, changes
):
    where = site(partition={**partition, "preempt_mode": "CANCEL"})
    finding = find(case(where, measured), "preemption")
    assert words in finding.what
    assert finding.can_lose == 0
    assert len(finding.change) == changes


@pytest.mark.parametrize(
    ("where", "word"),
    [
        ({"config": {"preempt_type": "preempt/none"}}, "No job is preempted on this cluster"),
        ({"partition": {"preempt_mode": "OFF"}}, "are not preempted"),
        ({"partition": {"tier": 10}}, "No partition of a higher tier shares its nodes"),
        ({"nodes": site_text.parse_nodes(APART)}, "No partition of a higher tier shares"),
    ],
)  # fmt: skip
def test_where_nothing_preempts_nothing_is_lost(where, word):
    finding = find(case(site(**where), SLOW), "preemption")
    assert word in finding.what
    assert finding.can_lose == 0


def test_a_way_of_preempting_that_is_not_known_is_not_guessed():
    for config in ({"preempt_mode": None}, {"preempt_type": "preempt/new"}, {"preempt_type": None}):
        where = site(config=config, partition={"preempt_mode": None})
        finding = find(case(where, QUICK), "preemption")
        assert "not known" in finding.what
        assert finding.can_lose == 102


def test_a_suspended_job_keeps_its_memory_and_may_time_out():
    finding = find(case(site("-other"), QUICK), "preemption")
    assert "memory on the GPUs stays taken" in finding.what
    assert "resources.timeout_s=1800" in finding.decided_by


@pytest.mark.parametrize(
    ("qos", "mode", "grace_s", "word"),
    [
        ("scavenger", "CANCEL", 120, "Slurm does not requeue"),
        ("normal", "REQUEUE", 0, "goes back into the queue"),
    ],
)
def test_where_qos_preempts_grace_and_mode_are_the_qos_s(qos, mode, grace_s, word):
    where = site(config={"preempt_type": "preempt/qos"})
    finding = find(case(where, QUICK, profile={"qos": qos}), "preemption")
    assert word in finding.what
    assert finding.decided_by[0].startswith(f"PreemptMode={mode} of ")
    assert finding.decided_by[1:3] == (f"GraceTime={grace_s} of QOS {qos}", "Preempt of QOS urgent")


def test_a_qos_that_is_not_named_or_cannot_be_read_is_not_guessed():
    config = {"preempt_type": "preempt/qos"}
    assert find(case(site(config=config), QUICK), "preemption").can_lose == 102
    where = site(config=config, qos=None)
    finding = find(case(where, QUICK, profile={"qos": "normal"}), "preemption")
    assert "no QOS can be read" in finding.what
    top = find(case(site(config=config), SLOW, profile={"qos": "urgent"}), "preemption")
    assert "No QOS preempts urgent" in top.what


def test_a_lead_that_is_too_short_is_made_up_for_by_the_jobs_own_clock():
    finding = find(case(measured=SLOW, profile={"signal_lead_s": 50}), "time limit")
    assert finding.can_lose == 0
    assert finding.change == ("signal_lead_s: 68 in the profile",)
    assert "acts by its own clock 78 s before" in finding.what
    assert find(case(measured=SLOW), "time limit").can_lose == 0
    late = site(partition={"over_time_limit_s": 60.0})
    finding = find(case(late, SLOW, profile={"signal_lead_s": 50}), "time limit")
    assert finding.can_lose == 0
    assert "OverTimeLimit=1 of partition low" in finding.decided_by


def test_a_limit_before_the_first_save_is_known_promises_nothing():
    finding = find(case(measured=SLOW, time="0:01:00", profile={"signal_lead_s": 1}), "time limit")
    assert finding.can_lose > 0
    assert "60 s is a short time" in finding.what
    assert finding.change[-1] == "resources.time=0:03:00 or more"
    longer = find(case(measured=SLOW, time="0:03:00", profile={"signal_lead_s": 1}), "time limit")
    assert longer.can_lose == 0


def test_a_signal_of_the_profile_s_own_is_not_judged():
    finding = find(case(measured=QUICK, profile={"sbatch": {"signal": "USR1@5"}}), "time limit")
    assert finding.decided_by == ("sbatch.signal=USR1@5",)


def test_a_lost_node_costs_what_is_not_committed():
    finding = find(case(measured=QUICK), "node failure")
    assert finding.can_lose == 102
    assert finding.decided_by == ("SlurmdTimeout=5", "checkpoint.every_steps=100")
    where = site(config={"slurmd_timeout_s": 0, "return_to_service": 0})
    never = find(case(where), "node failure")
    assert "never gives a silent node up" in never.what
    assert "ReturnToService=0" in never.decided_by


@pytest.mark.parametrize(
    ("where", "asked", "word"),
    [
        ({}, {"time": "1:00:01"}, "more than MaxTime=1:00:00 of partition low: sbatch takes"),
        ({"config": {"enforce_part_limits": "ALL"}}, {"time": "2:00:00"}, "sbatch refuses the job"),
        ({"partition": {"max_nodes": 1}}, {}, "It asks for 2 nodes, more than MaxNodes=1"),
        ({}, {"gpus_per_node": 4}, "0 of the 2 node(s) of partition low fit: sbatch refuses"),
        ({}, {"nodes": 4, "gpus_per_node": 1}, "partition low fit: the job waits for ever"),
        ({}, {"cpus_per_process": 3}, "6 CPU(s)"),
        ({"partition": {"up": False}}, {}, "is not up"),
        ({}, {}, "2 fit, and 1 work now"),
    ],
)  # fmt: skip
def test_what_a_partition_does_not_give_is_said(where, asked, word):
    assert word in find(case(site(**where), **asked), "submission", word).what


def test_memory_constraint_account_and_qos_are_looked_at():
    no_memory = replace(case(), profile=Profile())
    assert "gets all of each node" in find(no_memory, "submission", "names no memory").what
    where = site(config={"default_mem": "DefMemPerCPU=4000"})
    found = find(replace(case(where), profile=Profile()), "submission", "names no memory")
    assert "gets DefMemPerCPU=4000 MiB" in found.what
    assert find(case(profile={"constraint": "a100"}), "submission", "feature a100")
    where = site(partition={"allow_accounts": ("lab",)})
    assert find(case(where, profile={"account": "me"}), "submission", "Account me is none of")
    assert find(case(profile={"qos": "gold"}), "submission", "There is no QOS gold")
    where = site(config={"enforces_limits": True}, partition={"max_time_s": math.inf})
    long = case(where, profile={"qos": "scavenger"}, time="1-00:00:00")
    assert find(long, "submission", "more than MaxWall=12:00:00 of QOS scavenger")


def test_a_job_that_fits_leaves_nothing_to_say_of_submission():
    nodes = tuple(replace(node, works=True) for node in site().nodes)
    assert not [f for f in diagnose(case(site(nodes=nodes))) if f.event == "submission"]


def test_exit_codes_that_slurm_requeues_by_itself_are_ours():
    config = {"requeue_exit": frozenset({2, 7}), "requeue_exit_hold": frozenset({85, 86})}
    where = site(config=config)
    first = find(case(where), "requeue", "starts again")
    assert first.what.startswith("A run whose user has to mend something")
    assert first.decided_by == ("RequeueExit has 2",)
    assert find(case(where), "requeue", "is held").decided_by == ("RequeueExitHold has 85, 86",)
    assert not [f for f in diagnose(case()) if "RequeueExit" in str(f.decided_by)]


def test_the_other_site_s_ways_are_each_said_once():
    found = diagnose(case(site("-other")))
    decided = [by for finding in found for by in finding.decided_by]
    for by in (
        *("JobRequeue=0", "AuthInfo cred_expire=5", "ProctrackType=proctrack/pgid"),
        *("AccountingStorageType=accounting_storage/none", "torch.distributed"),
    ):
        assert decided.count(by) == 1, by


def test_several_partitions_are_each_diagnosed():
    where = site()
    high = where.others[0]
    both = replace(where, partitions=(*where.partitions, high), others=())
    found = [f for f in diagnose(case(both, SLOW)) if f.event == "preemption"]
    assert [f.can_lose for f in found] == [131, 0]


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Programs of Slurm's names that print what the real ones did; returns their folder."""
    answers = {
        "scontrol": f"""case "$*" in
"show config") cat '{DATA}/config.txt';;
"show partition --oneliner") cat '{DATA}/partitions.txt';;
*) exit 9;; esac""",
        "sinfo": f"cat '{DATA}/nodes.txt'",
        "sacctmgr": f"cat '{DATA}/qos.txt'",
    }
    for name, body in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


def test_a_site_is_what_the_programs_say(programs):
    assert read_site(None) == site()
    names = [each.name for each in read_site("high,low").partitions]
    assert names == ["high", "low"]
    with pytest.raises(UserError, match="'gpu' is none of this cluster's; there are low, high"):
        read_site("low,gpu")


def test_a_program_that_fails_leaves_its_part_unknown(programs):
    for name in ("sinfo", "sacctmgr"):
        (programs / name).write_text("#!/bin/sh\necho down >&2\nexit 1\n")
    found = read_site("low")
    assert (found.nodes, found.qos) == ((), None)
    assert [line.partition(":")[0] for line in found.unknown] == ["nodes of the partition", "QOS"]
    # Nodes that are not known rule nothing out.
    assert find(case(found, SLOW), "preemption").can_lose == 131
    (programs / "scontrol").write_text("#!/bin/sh\necho no controller >&2\nexit 1\n")
    with pytest.raises(SchedulerError, match="scontrol show config: no controller"):
        read_site("low")


def test_a_plugin_that_may_change_jobs_is_an_unknown(programs):
    lua = text("config").replace("JobSubmitPlugins        = (null)", "JobSubmitPlugins = lua")
    (programs / "config.txt").write_text(lua)
    script = (programs / "scontrol").read_text()
    (programs / "scontrol").write_text(script.replace(f"{DATA}/config", f"{programs}/config"))
    assert read_site("low").unknown == ("what JobSubmitPlugins=lua changes of the job's options",)


def test_a_config_and_a_run_directory_are_examined_alike(programs, tmp_path):
    profile = tmp_path / "a: 'b'.yaml"
    profile.write_text("{partition: low, mem_gb: 1}")
    run = tmp_path / "run"
    spec = spec_from_tree({**GOOD, "run_dir": str(run)})
    config = tmp_path / "x.yaml"
    config.write_text(spec.model_dump_json())
    run.mkdir()
    tree = {"spec": spec.model_dump(mode="json")}
    (run / "run.json").write_text(json.dumps(tree))
    by_config = examine(str(config), ["checkpoint.every_steps=7"], str(profile))
    assert examine(str(run), ["checkpoint.every_steps=7"], str(profile)) == by_config
    name, found = by_config
    assert (name, found.measured) == (spec.name, None)
    assert found.site == "cluster testbed, Slurm 22.05.8, partition low, 2 node(s)"
    assert "checkpoint.every_steps=7" in str(found.findings)


def test_the_report_has_every_finding_on_lines_of_a_hundred_characters():
    where = site("-other")
    findings = diagnose(case(where, SLOW))
    found = Diagnosis("cluster x", SLOW, lead_s(SLOW), findings, ("QOS: no answer",))
    shown = doctor_text("run", found)
    flat = " ".join(shown.split())
    assert all(" ".join(finding.what.split()) in flat for finding in findings)
    assert max(map(len, shown.splitlines())) <= 100
    assert "proposed signal_lead_s: 68, for" in flat
    assert "not read QOS: no answer" in flat
    assert doctor_json(found)["findings"][0]["event"] == findings[0].event
    before = doctor_text("run", replace(found, measured=None, signal_lead_s=None))
    assert "proposed" not in before
