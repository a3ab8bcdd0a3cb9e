"""The configuration files of a testbed, as text made from settings; nothing here touches a disk."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CLUSTER = "testbed"


@dataclass(frozen=True)
class Settings:
    """What kind of cluster a testbed is.

    Raises:
        ValueError: A number is out of range.
    """

    num_nodes: int = 2
    cpus_per_node: int = 4
    memory_mib_per_node: int = 8000
    # Slurm counts and hands these out; no device is behind them.
    gpus_per_node: int = 0
    # Whether there is a database behind sacct.
    accounting: bool = False
    # From telling a job in `low` that one in `high` wants its nodes to ending it.
    grace_s: int = 0
    preempt_send_user_signal: bool = False
    # What becomes of a job in `low` then.
    preempt_mode: Literal["REQUEUE", "CANCEL", "SUSPEND", "OFF"] = "REQUEUE"
    job_requeue: bool = True
    proctrack: Literal["linuxproc", "pgid"] = "linuxproc"
    # From SIGTERM to SIGKILL.
    kill_wait_s: int = 5
    # How long squeue and scontrol know a job that has ended. Slurm takes 0 for "always".
    min_job_age_s: int = 300
    # How long a credential lives. A requeued job waits as long before it starts again.
    cred_expire_s: int = 5
    slurmd_timeout_s: int = 5
    # More lines of slurm.conf.
    more: str = ""

    def __post_init__(self) -> None:
        at_least = {
            **dict.fromkeys(("num_nodes", "cpus_per_node", "memory_mib_per_node"), 1),
            **dict.fromkeys(("kill_wait_s", "cred_expire_s", "slurmd_timeout_s"), 1),
            **dict.fromkeys(("gpus_per_node", "grace_s", "min_job_age_s"), 0),
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}, not {getattr(self, name)}")

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes' names, n1 first."""
        return tuple(f"n{number}" for number in range(1, self.num_nodes + 1))


# What `scontrol reconfigure` changes in Slurm 22.05; the daemons read the rest when they start.
LIVE = frozenset(
    {"grace_s", "preempt_send_user_signal", "job_requeue", "kill_wait_s", "min_job_age_s"}
)


@dataclass(frozen=True)
class Place:
    """Where a testbed's files are.

    Args:
        folder: An absolute path, of any length and any characters; holds what remains: logs, jobs.
    """

    folder: Path

    @property
    def runtime(self) -> Path:
        """A folder with a short and plain name, for configuration and sockets, while it is up.

        A socket's path has room for 107 bytes (unix(7)), and munged refuses folders that other
        users own or cannot enter. The same folder has the same one each time.
        """
        return Path("/run") / f"qlora-slurm-{hashlib.sha256(bytes(self.folder)).hexdigest()[:8]}"

    @property
    def files(self) -> Path:
        """A link to ``folder``, whose own name slurm.conf may have no way to write."""
        return self.runtime / "files"

    @property
    def slurm_conf(self) -> Path:
        """What SLURM_CONF is to be; the other configuration files are beside it."""
        return self.runtime / "slurm.conf"

    @property
    def munge_key(self) -> Path:
        """The secret by which daemons and clients know each other."""
        return self.runtime / "munge.key"

    @property
    def munge_socket(self) -> Path:
        """Where munged listens."""
        return self.runtime / "munge.socket"

    @property
    def database_socket(self) -> Path:
        """Where MariaDB listens, and nowhere else."""
        return self.runtime / "mariadb.socket"

    @property
    def database(self) -> Path:
        """MariaDB's folder."""
        return self.files / "db"

    def spool(self, node: str) -> Path:
        """A slurmd's folder, as its sockets are named."""
        return self.files / "spool" / node


def gpu_files(place: Place, settings: Settings) -> tuple[Path, ...]:
    """Links that stand for GPUs.

    Slurm sets CUDA_VISIBLE_DEVICES, from the number at the end, for character devices only.
    """
    return tuple(place.runtime / f"gpu{number}" for number in range(settings.gpus_per_node))


def slurm_conf(place: Place, settings: Settings, ports: Mapping[str, int], host: str) -> str:
    """slurm.conf(5).

    Args:
        place: Where the files are.
        settings: What kind of cluster.
        ports: By daemon: ``slurmctld``, ``slurmdbd`` and the nodes' names.
        host: This machine's short name, as ``hostname -s`` prints it.
    """
    gres = f" Gres=gpu:{settings.gpus_per_node}" if settings.gpus_per_node else ""
    node = (
        f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs={settings.cpus_per_node} "
        f"RealMemory={settings.memory_mib_per_node}{gres}"
    )
    controller = ""
    if settings.preempt_send_user_signal:
        controller = "SlurmctldParameters=preempt_send_user_signal\n"
    storage = "AccountingStorageType=accounting_storage/none"
    if settings.accounting:
        storage = (
            "AccountingStorageType=accounting_storage/slurmdbd\n"
            f"AccountingStorageHost=127.0.0.1\nAccountingStoragePort={ports['slurmdbd']}\n"
            # Of AuthInfo's socket nothing holds for slurmdbd; this is its name there.
            f"AccountingStoragePass={place.munge_socket}"
        )
    nodes = "\n".join(f"NodeName={name} Port={ports[name]} {node}" for name in settings.nodes)
    return f"""\
ClusterName={CLUSTER}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports["slurmctld"]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={place.munge_socket},cred_expire={settings.cred_expire_s}
MailProg=/bin/true
StateSaveLocation={place.files}/state
SlurmdSpoolDir={place.files}/spool/%n
SlurmctldPidFile={place.runtime}/slurmctld.pid
SlurmdPidFile={place.runtime}/slurmd-%n.pid
ProctrackType=proctrack/{settings.proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
# Nodes have what is written here, whatever the machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
# A job that could not start when it was submitted is looked at once a second.
SchedulerParameters=sched_interval=1,bf_interval=1
{controller}\
PreemptType=preempt/partition_prio
PreemptMode={"SUSPEND,GANG" if settings.preempt_mode == "SUSPEND" else "REQUEUE"}
JobRequeue={int(settings.job_requeue)}
# Two of these pass before a lost node counts as not responding.
MessageTimeout=5
KillWait={settings.kill_wait_s}
MinJobAge={settings.min_job_age_s}
SlurmdTimeout={settings.slurmd_timeout_s}
{settings.more}
{storage}
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 \
PreemptMode={settings.preempt_mode} \
GraceTime={settings.grace_s} MaxTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=60
"""


def gres_conf(place: Place, settings: Settings) -> str:
    """gres.conf(5)."""
    return "AutoDetect=off\n" + "".join(
        f"NodeName={node} Name=gpu File={file}\n"
        for node in settings.nodes
        for file in gpu_files(place, settings)
    )


def slurmdbd_conf(place: Place, port: int) -> str:
    """slurmdbd.conf(5). Where the database's socket is, slurmdbd is told by MYSQL_UNIX_PORT."""
    return f"""\
AuthType=auth/munge
AuthInfo=socket={place.munge_socket}
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
CommunicationParameters=NoInAddrAny
SlurmUser=root
PidFile={place.runtime}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
"""
