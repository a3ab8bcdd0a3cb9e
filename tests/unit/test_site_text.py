"""What Slurm's programs print, captured, and what is read from it."""

import math
from pathlib import Path

import pytest

from qlora_dist.scheduler import SchedulerError
from qlora_slurm import site_text

# Printed by a Slurm 22.05.8 of slurm/testbed; "other" is one with as much as may be set otherwise.
DATA = Path(__file__).parents[1] / "data" / "slurm"


def text(name):
    return (DATA / f"{name}.txt").read_text(encoding="utf-8")


def test_a_captured_configuration_is_read():
    config = site_text.parse_config(text("config"))
    assert (config.version, config.cluster) == ("22.05.8", "testbed")
    assert config.preempt_mode == "REQUEUE"
    assert (config.kill_wait_s, config.slurmd_timeout_s, config.cred_expire_s) == (5, 5, 5)
    assert (config.over_time_limit_s, config.min_job_age_s) == (0, 300)
    assert (config.accounting, config.job_requeue, config.user_signal) == (True, True, False)
    assert (config.allocates_memory, config.default_mem) == (True, "")
    assert (config.requeue_exit, config.job_submit) == (frozenset(), "")
    assert site_text.lacking(config) == []


def test_another_captured_configuration_is_read():
    config = site_text.parse_config(text("config-other"))
    assert config.preempt_mode == "SUSPEND"
    assert config.proctrack == "proctrack/pgid"
    assert (config.accounting, config.job_requeue, config.user_signal) == (False, False, True)


@pytest.mark.parametrize(
    ("line", "instead", "field", "value"),
    [
        ("KillWait                = 5 sec", "KillWait = 30 sec", "kill_wait_s", 30),
        ("TimeLimit           = 0 min", "TimeLimit = 2 min", "over_time_limit_s", 120),
        ("TimeLimit           = 0 min", "TimeLimit = UNLIMITED", "over_time_limit_s", math.inf),
        ("PreemptMode             = REQUEUE", "PreemptMode = GANG", "preempt_mode", "SUSPEND"),
        ("PreemptMode             = REQUEUE", "PreemptMode = NEW", "preempt_mode", None),
        (",cred_expire=5", "", "cred_expire_s", 120),
        ("RequeueExit             = (null)", "RequeueExit = 1-3,85", "requeue_exit", {1, 2, 3, 85}),
        ("DefMemPerNode", "DefMemPerCPU = 7\nX", "default_mem", "DefMemPerCPU=7"),
        ("SlurmdParameters", "PreemptParameters = send_user_signal\nX", "user_signal", True),
        ("StorageEnforce = none", "StorageEnforce = limits,qos", "enforces_limits", True),
    ],
)  # fmt: skip
def test_values_of_the_configuration_are_read_as_slurm_writes_them(line, instead, field, value):
    assert line in text("config")
    config = site_text.parse_config(text("config").replace(line, instead))
    assert getattr(config, field) == value


def test_an_answer_that_is_none_is_an_error():
    with pytest.raises(SchedulerError, match="not understood: slurm_load"):
        site_text.parse_config("slurm_load_ctl_conf error: Unable to contact slurm controller")
    with pytest.raises(SchedulerError, match="'State'"):
        site_text.parse_partitions(text("partitions").replace("State=", "Stat="))
    with pytest.raises(SchedulerError, match="sinfo: not understood"):
        site_text.parse_nodes("low|n1|4")


def test_captured_partitions_nodes_and_qos_are_read():
    low, high = site_text.parse_partitions(text("partitions"))
    assert (low.name, low.default, low.tier, low.grace_s) == ("low", True, 1, 10)
    assert (low.preempt_mode, low.max_time_s, low.max_nodes) == ("REQUEUE", 3600, math.inf)
    assert (high.name, high.default, high.tier, high.preempt_mode) == ("high", False, 10, "OFF")
    nodes = site_text.parse_nodes(text("nodes"))
    assert [(n.partition, n.name, n.gpus, n.works) for n in nodes][:3] == [
        ("high", "n1", 2, True),
        ("low", "n1", 2, True),
        ("high", "n2", 2, False),
    ]
    qos = {each.name: each for each in site_text.parse_qos(text("qos"))}
    assert qos["scavenger"].grace_s == 120
    assert (qos["scavenger"].preempt_mode, qos["scavenger"].max_time_s) == ("CANCEL", 43200)
    assert (qos["normal"].preempt_mode, qos["normal"].max_time_s) == (None, math.inf)
    assert qos["urgent"].preempts == ("normal", "scavenger")


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", 0),
        ("gpu:4", 4),
        ("gpu:h100:8(S:0-1)", 8),
        ("gpu:a:2(S:0),gpu:b:2(S:1),shard:16", 4),
        ("craynetwork:4", 0),
    ],
)
def test_gpus_of_a_node_are_counted(gres, gpus):
    assert site_text.parse_nodes(f"low|n1|4|8000|{gres}|a,b|idle")[0].gpus == gpus
