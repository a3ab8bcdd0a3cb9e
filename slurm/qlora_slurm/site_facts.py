"""What a cluster is set to: frozen values that nothing is guessed into.

:mod:`qlora_slurm.ask` asks Slurm for them, and :mod:`qlora_slurm.site_text` reads its answers.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """``scontrol show config``; None for what the answer lacks.

    Attributes:
        version: Slurm's.
        cluster: Its name.
        preempt_type: Such as preempt/partition_prio.
        preempt_mode: OFF, REQUEUE, CANCEL or SUSPEND; also None for one that is none of these.
        user_signal: Whether a preempted job gets the signal of its own --signal.
        kill_wait_s: From SIGTERM to SIGKILL.
        job_requeue: Whether jobs that say nothing of it may be requeued.
        over_time_limit_s: What a job may run past its limit; infinity for no end.
        slurmd_timeout_s: How long a node may be silent before it is down; 0 for ever.
        cred_expire_s: How long a requeued job waits before it starts again.
        min_job_age_s: How long a job is known after its end.
        return_to_service: 0: a node that was down stays so until an administrator says otherwise.
        proctrack: Such as proctrack/cgroup.
        accounting: Whether there is a database behind sacct and sacctmgr.
        enforces_limits: Whether the limits of associations and QOS are enforced.
        enforce_part_limits: NO, ANY or ALL: what sbatch refuses of what no partition allows.
        allocates_memory: Whether jobs are given memory as they are given cores.
        default_mem: Memory of a job that asks for none, as Slurm writes it; "" for a whole node's.
        requeue_exit: Exit codes after which Slurm requeues a job.
        requeue_exit_hold: The same, and holds it.
        job_submit: Plugins that may change what a job asks for; "" for none.
    """

    version: str | None
    cluster: str | None
    preempt_type: str | None
    preempt_mode: str | None
    user_signal: bool | None
    kill_wait_s: float | None
    job_requeue: bool | None
    over_time_limit_s: float | None
    slurmd_timeout_s: float | None
    cred_expire_s: float | None
    min_job_age_s: float | None
    return_to_service: int | None
    proctrack: str | None
    accounting: bool | None
    enforces_limits: bool | None
    enforce_part_limits: str | None
    allocates_memory: bool | None
    default_mem: str | None
    requeue_exit: frozenset[int] | None
    requeue_exit_hold: frozenset[int] | None
    job_submit: str | None


@dataclass(frozen=True)
class Partition:
    """``scontrol show partition``.

    Attributes:
        default: Whether jobs that name none go here.
        up: Whether it takes and starts jobs.
        tier: PriorityTier; a job of a higher one may preempt.
        preempt_mode: Of its jobs; None where it is the cluster's.
        grace_s: From the first SIGTERM of a preemption to its end.
        max_time_s: Longest time limit; infinity for none.
        max_nodes: Of one job; infinity for no limit.
        over_time_limit_s: As Config's; None where it is the cluster's.
        default_mem: As Config's.
        qos: Whose limits hold for its jobs; "" for none.
        allow_accounts: None for all.
    """

    name: str
    default: bool
    up: bool
    tier: int
    preempt_mode: str | None
    grace_s: float
    max_time_s: float
    max_nodes: float
    over_time_limit_s: float | None
    default_mem: str
    qos: str
    allow_accounts: tuple[str, ...] | None


@dataclass(frozen=True)
class Node:
    """A row of ``sinfo -N``: a node as one partition has it.

    Attributes:
        features: What a constraint may ask for.
        works: Whether it takes jobs, now or once others have ended.
    """

    partition: str
    name: str
    cpus: int
    mem_mib: int
    gpus: int
    features: frozenset[str]
    works: bool


@dataclass(frozen=True)
class Qos:
    """A row of ``sacctmgr show qos``.

    Attributes:
        grace_s: As Partition's.
        preempts: QOS whose jobs its jobs may preempt.
        preempt_mode: Of its jobs; None where it is the cluster's.
        max_time_s: Longest time limit; infinity for none.
    """

    name: str
    grace_s: float
    preempts: tuple[str, ...]
    preempt_mode: str | None
    max_time_s: float


@dataclass(frozen=True)
class Site:
    """A cluster, as a job in some of its partitions meets it.

    Attributes:
        partitions: Those that the job may start in.
        others: The rest.
        nodes: Of all partitions; empty where Slurm did not say.
        qos: None without accounting, or where it did not answer.
        unknown: What Slurm did not say, for a person.
    """

    config: Config
    partitions: tuple[Partition, ...]
    others: tuple[Partition, ...]
    nodes: tuple[Node, ...]
    qos: tuple[Qos, ...] | None
    unknown: tuple[str, ...]
