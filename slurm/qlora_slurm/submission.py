"""Whether a partition would take the job at all, and where it would start."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qlora_dist.diagnosis import Finding
from qlora_slurm.case import Case, duration, number
from qlora_slurm.site_facts import Node, Partition

_MEM_OPTIONS = ("mem", "mem-per-cpu", "mem-per-gpu")
# A constraint that can be judged: features that must all be there. sbatch(1) knows more.
_FEATURES = re.compile(r"[\w.-]+(&[\w.-]+)*")


def submission(case: Case) -> Iterator[Finding]:
    """What sbatch, and then the scheduler, say to the job."""
    for partition in case.site.partitions:
        yield from _partition(case, partition)
        yield from _nodes(case, partition)
        yield from _memory(case, partition)
    yield from _qos(case)


def _partition(case: Case, partition: Partition) -> Iterator[Finding]:
    at = f"of partition {partition.name}"
    if not partition.up:
        what = f"Partition {partition.name} is not up: the job waits until it is."
        yield Finding("submission", what, (f"State {at}",))
    if case.time_s > partition.max_time_s:
        limit = f"MaxTime={duration(partition.max_time_s)} {at}"
        wish = (
            f"resources.time={duration(partition.max_time_s)} or less; at the limit the run saves "
            "and goes back into the queue by itself"
        )
        yield _refused(case, f"It asks for {duration(case.time_s)}, more than {limit}", limit, wish)
    if (nodes := case.plan.topology.nodes) > partition.max_nodes:
        limit = f"MaxNodes={number(partition.max_nodes)} {at}"
        wish = f"resources.nodes={number(partition.max_nodes)} or fewer"
        yield _refused(case, f"It asks for {nodes} nodes, more than {limit}", limit, wish)
    account, allowed = case.profile.account, partition.allow_accounts
    if account is not None and allowed is not None and account not in allowed:
        limit = f"AllowAccounts={','.join(allowed)} {at}"
        wish = "another account, or another partition, in the profile"
        yield _refused(case, f"Account {account} is none of {limit}", limit, wish)


def _refused(case: Case, what: str, limit: str, wish: str) -> Finding:
    enforced = case.site.config.enforce_part_limits
    follows = {
        "NO": "sbatch takes the job, and it waits for ever",
        "ANY": "sbatch refuses the job unless another of its partitions takes it",
        "ALL": "sbatch refuses the job",
        "YES": "sbatch refuses the job",
    }.get(enforced or "", "sbatch may refuse the job, or it waits for ever")
    by = (limit, f"EnforcePartLimits={enforced or 'unknown'}")
    return Finding("submission", f"{what}: {follows}.", by, None, (wish,), never_starts=True)


@dataclass(frozen=True)
class _Need:
    """One thing that the job asks of each node.

    Attributes:
        what: It, as a person would say it.
        key: Where it was asked for.
        nodes: Names of those that have it.
        refused: Whether sbatch itself refuses what too few have, as Slurm 22.05 does for all but
            CPUs and the number of nodes; those jobs wait for ever unless limits are enforced.
    """

    what: str
    key: str
    nodes: frozenset[str]
    refused: bool = True


def _nodes(case: Case, partition: Partition) -> Iterator[Finding]:
    nodes = [node for node in case.site.nodes if node.partition == partition.name]
    if not nodes:
        return
    asked, needs = case.plan.topology.nodes, list(_needs(case, nodes))
    fit = frozenset(node.name for node in nodes).intersection(*(need.nodes for need in needs))
    works = sum(node.works for node in nodes if node.name in fit)
    size = f"{len(nodes)} node(s) of partition {partition.name}"
    if len(fit) < asked:
        wishes = ", ".join(need.what for need in needs)
        what = f"It asks for {asked} node(s)" + (f" with {wishes} each" if wishes else "")
        what += f", and {len(fit)} of the {size} fit: "
        # Where there are too few nodes at all, none of these is short.
        short = [need for need in needs if len(need.nodes) < min(asked, len(nodes))]
        waits = case.site.config.enforce_part_limits == "NO"
        waits = waits and not any(need.refused and len(need.nodes) < len(nodes) for need in short)
        what += "the job waits for ever." if waits else "sbatch refuses the job."
        by = [f"{len(need.nodes)} of the {size} with {need.what}" for need in short]
        keys = [need.key for need in short] or ["resources.nodes"]
        change = f"less of {', '.join(keys)}, or another partition"
        if not short and len(fit) == len(nodes):
            change = f"resources.nodes={len(nodes)} or fewer, or another partition"
        yield Finding("submission", what, tuple(by) or (size,), None, (change,), never_starts=True)
    elif works < asked:
        what = f"Of the {size}, {len(fit)} fit, and {works} work now: the job waits for others."
        yield Finding("submission", what, ("states of the nodes",))


def _needs(case: Case, nodes: Sequence[Node]) -> Iterator[_Need]:
    topology, profile = case.plan.topology, case.profile
    each = case.plan.spec.resources.cpus_per_process
    if topology.device == "cuda":
        least = topology.processes_per_node
        names = frozenset(node.name for node in nodes if node.gpus >= least)
        yield _Need(f"{least} GPU(s)", "resources.gpus_per_node", names)
    if each is not None:
        least = each * topology.processes_per_node
        names = frozenset(node.name for node in nodes if node.cpus >= least)
        yield _Need(f"{least} CPU(s)", "resources.cpus_per_process", names, refused=False)
    if profile.mem_gb is not None:
        least = int(profile.mem_gb * 1024)
        names = frozenset(node.name for node in nodes if node.mem_mib >= least)
        yield _Need(f"{profile.mem_gb:g} GB of memory", "the profile's mem_gb", names)
    if profile.constraint is not None and _FEATURES.fullmatch(profile.constraint):
        asked = set(profile.constraint.split("&"))
        names = frozenset(node.name for node in nodes if asked <= node.features)
        yield _Need(f"feature {profile.constraint}", "the profile's constraint", names)


def _memory(case: Case, partition: Partition) -> Iterator[Finding]:
    config = case.site.config
    asked = case.profile.mem_gb is not None or set(_MEM_OPTIONS) & set(case.profile.sbatch)
    default = partition.default_mem or config.default_mem
    if asked or not config.allocates_memory or default is None:
        return
    if default:
        what = f"The job names no memory, and gets {default} MiB: loading a model may need more."
        by = f"{default}"
    else:
        what = "The job names no memory, and gets all of each node: it waits for whole nodes."
        by = "no DefMemPerNode or DefMemPerCPU"
    yield Finding("submission", what, (by,), None, ("mem_gb in the profile",))


def _qos(case: Case) -> Iterator[Finding]:
    name, known = case.profile.qos, {qos.name: qos for qos in case.site.qos or ()}
    if name is None or case.site.qos is None:
        return
    if name not in known:
        what = f"There is no QOS {name}: sbatch refuses the job."
        by = (f"QOS of this cluster: {', '.join(known)}",)
        yield Finding("submission", what, by, never_starts=True)
    elif case.time_s > known[name].max_time_s and case.site.config.enforces_limits:
        limit = f"MaxWall={duration(known[name].max_time_s)} of QOS {name}"
        what = (
            f"It asks for {duration(case.time_s)}, more than {limit}: it is refused or waits for "
            "ever."
        )
        wish = f"resources.time={duration(known[name].max_time_s)} or less"
        yield Finding("submission", what, (limit,), None, (wish,), never_starts=True)
