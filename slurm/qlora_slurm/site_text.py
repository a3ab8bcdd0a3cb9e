"""Reading what scontrol, sinfo and sacctmgr print; pure functions over text.

Names and units: slurm.conf(5), scontrol(1), sinfo(1) and sacctmgr(1) of Slurm 22.05.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields

from qlora_dist.scheduler import SchedulerError
from qlora_slurm.site_facts import Config, Node, Partition, Qos

SINFO = ("sinfo", "--all", "--Node", "--noheader", "--format=%R|%N|%c|%m|%G|%f|%t")
SACCTMGR = (
    *("sacctmgr", "--noheader", "--parsable2", "show", "qos"),
    "format=Name,GraceTime,Preempt,PreemptMode,MaxWall",
)
# slurm.conf(5), AuthInfo, cred_expire: what it is where nothing is said.
_CRED_EXPIRE_S = 120.0
# sinfo(1), NODE STATE CODES: what takes no more jobs by itself.
_BROKEN = ("down", "drain", "drng", "fail", "boot", "futr", "inval", "unk", "npc", "maint", "plnd")
_UNITS_S = {"sec": 1, "min": 60, "": 1}


def parse_config(text: str) -> Config:
    """Read ``scontrol show config``.

    Raises:
        SchedulerError: It is none.
    """
    values = dict(re.findall(r"^(\S+)\s*= ?(.*?)\s*$", text, re.MULTILINE))
    if "SLURM_VERSION" not in values:
        raise SchedulerError(f"scontrol show config: not understood: {text[:200]}")

    def some(name: str) -> str | None:
        value = values.get(name)
        return "" if value == "(null)" else value

    return Config(
        version=some("SLURM_VERSION"),
        cluster=some("ClusterName"),
        preempt_type=some("PreemptType"),
        preempt_mode=_mode(some("PreemptMode") or ""),
        user_signal=_user_signal(values),
        kill_wait_s=_seconds(some("KillWait")),
        job_requeue=_flag(some("JobRequeue")),
        over_time_limit_s=_seconds(some("OverTimeLimit")),
        slurmd_timeout_s=_seconds(some("SlurmdTimeout")),
        cred_expire_s=_cred_expire(some("AuthInfo")),
        min_job_age_s=_seconds(some("MinJobAge")),
        return_to_service=_number(some("ReturnToService")),
        proctrack=some("ProctrackType"),
        accounting=_accounting(some("AccountingStorageType")),
        enforces_limits=_enforces(some("AccountingStorageEnforce")),
        enforce_part_limits=some("EnforcePartLimits"),
        allocates_memory=_memory(some("SelectTypeParameters")),
        default_mem=_default_mem(values),
        requeue_exit=_codes(some("RequeueExit")),
        requeue_exit_hold=_codes(some("RequeueExitHold")),
        job_submit=some("JobSubmitPlugins"),
    )


def lacking(config: Config) -> list[str]:
    """Fields that the answer had no value for."""
    return [field.name for field in fields(config) if getattr(config, field.name) is None]


def parse_partitions(text: str) -> tuple[Partition, ...]:
    """Read ``scontrol show partition --oneliner``.

    Raises:
        SchedulerError: A partition lacks a field.
    """
    return tuple(_partition(line) for line in text.splitlines() if line.strip())


def _partition(line: str) -> Partition:
    values = dict(re.findall(r"(\w+)=(\S*)", line))
    try:
        grace, limit = _seconds(values["GraceTime"]), _seconds(values["MaxTime"])
        mode, over = values["PreemptMode"], values["OverTimeLimit"]
        accounts = values.get("AllowAccounts", "ALL")
        if grace is None or limit is None:
            raise ValueError(f"GraceTime={values['GraceTime']} MaxTime={values['MaxTime']}")
        return Partition(
            name=values["PartitionName"],
            default=values["Default"] == "YES",
            up=values["State"] == "UP",
            tier=int(values["PriorityTier"]),
            preempt_mode=_mode(mode),
            grace_s=grace,
            max_time_s=limit,
            max_nodes=math.inf if values["MaxNodes"] == "UNLIMITED" else int(values["MaxNodes"]),
            over_time_limit_s=None if over == "NONE" else _minutes(over),
            default_mem=_default_mem(values) or "",
            qos="" if values["QoS"] == "N/A" else values["QoS"],
            allow_accounts=None if accounts == "ALL" else tuple(accounts.split(",")),
        )
    except (KeyError, ValueError) as error:
        raise SchedulerError(f"scontrol show partition: {error}: {line[:200]}") from None


def parse_nodes(text: str) -> tuple[Node, ...]:
    """Read what ``SINFO`` prints.

    Raises:
        SchedulerError: A row is none.
    """
    return tuple(_node(line) for line in text.splitlines() if line.strip())


def _node(line: str) -> Node:
    try:
        partition, name, cpus, mem, gres, features, state = line.strip().split("|")
        return Node(
            partition=partition,
            name=name,
            # A "+" says that others of a group have more; of one node there is none.
            cpus=int(cpus.rstrip("+")),
            mem_mib=int(mem.rstrip("+")),
            gpus=_gpus(gres),
            features=frozenset() if features == "(null)" else frozenset(features.split(",")),
            works=not state.endswith("*") and not state.startswith(_BROKEN),
        )
    except ValueError:
        raise SchedulerError(f"sinfo: not understood: {line[:200]}") from None


def parse_qos(text: str) -> tuple[Qos, ...]:
    """Read what ``SACCTMGR`` prints.

    Raises:
        SchedulerError: A row is none.
    """
    found = []
    for line in text.splitlines():
        try:
            name, grace, preempts, mode, limit = line.split("|")
            found.append(
                Qos(
                    name=name,
                    grace_s=_seconds(grace) or 0.0,
                    preempts=tuple(preempts.split(",")) if preempts else (),
                    preempt_mode=_mode(mode.upper()),
                    max_time_s=math.inf if not limit else _clock(limit),
                )
            )
        except ValueError:
            raise SchedulerError(f"sacctmgr show qos: not understood: {line[:200]}") from None
    return tuple(found)


def _mode(text: str) -> str | None:
    """``REQUEUE``, ``GANG,SUSPEND``; None where it says nothing of its own, such as ``cluster``."""
    words = text.split(",")
    found = [word for word in words if word in ("OFF", "REQUEUE", "CANCEL", "SUSPEND")]
    # By itself it shares out time, by suspending.
    return found[0] if found else ("SUSPEND" if "GANG" in words else None)


def _flag(text: str | None) -> bool | None:
    return None if text not in ("0", "1") else text == "1"


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _seconds(text: str | None) -> float | None:
    """``5 sec``, ``2 min``, ``10``, ``1-00:00:00``, ``UNLIMITED``; None for anything else."""
    if text in ("UNLIMITED", "INFINITE"):
        return math.inf
    if text is not None and ":" in text:
        return _clock(text)
    match = re.fullmatch(r"(\d+)\s*(sec|min|)", text or "")
    return None if match is None else float(match[1]) * _UNITS_S[match[2]]


def _minutes(text: str) -> float:
    return math.inf if text in ("UNLIMITED", "INFINITE") else 60.0 * int(text)


def _clock(text: str) -> float:
    days, _, clock = text.rpartition("-")
    seconds = 0
    for part in clock.split(":"):
        seconds = 60 * seconds + int(part)
    return float(int(days or 0) * 86400 + seconds)


def _user_signal(values: Mapping[str, str]) -> bool | None:
    # Newer versions have it among PreemptParameters.
    if "SlurmctldParameters" not in values:
        return None
    both = values["SlurmctldParameters"] + "," + values.get("PreemptParameters", "")
    return "send_user_signal" in both


def _cred_expire(text: str | None) -> float | None:
    if text is None:
        return None
    match = re.search(r"cred_expire=(\d+)", text)
    return float(match[1]) if match else _CRED_EXPIRE_S


def _accounting(text: str | None) -> bool | None:
    return None if text is None else text.removeprefix("accounting_storage/") not in ("none", "")


def _enforces(text: str | None) -> bool | None:
    return None if text is None else bool({"limits", "safe", "all"} & set(text.split(",")))


def _memory(text: str | None) -> bool | None:
    return None if text is None else "MEMORY" in text.upper()


def _default_mem(values: Mapping[str, str]) -> str | None:
    found = [name for name in ("DefMemPerCPU", "DefMemPerNode") if name in values]
    if not found:
        return None
    value = values[found[0]]
    return "" if value == "UNLIMITED" else f"{found[0]}={value}"


def _codes(text: str | None) -> frozenset[int] | None:
    return None if text is None else frozenset(_each_code(text))


def _each_code(text: str) -> Iterator[int]:
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        yield from range(int(first), int(last or first) + 1)


def _gpus(gres: str) -> int:
    """GPUs in ``gpu:4``, ``gpu:h100:8(S:0-1)``, ``gpu:a:2,gpu:b:2,shard:8``."""
    bare = re.sub(r"\([^)]*\)", "", gres)
    parts = [entry.split(":") for entry in bare.split(",")]
    return sum(int(part[-1]) for part in parts if part[0] == "gpu" and part[-1].isdecimal())
