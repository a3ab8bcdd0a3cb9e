"""Asking Slurm what it is set to, each program with a time limit."""

from qlora_dist.errors import UserError
from qlora_dist.scheduler import SchedulerError, run_command
from qlora_slurm import site_text
from qlora_slurm.site_facts import Node, Partition, Qos, Site


def read_site(partition: str | None) -> Site:
    """Ask Slurm what it is set to.

    Args:
        partition: Where the job goes, or several with commas; None for the default.

    Raises:
        SchedulerError: Slurm is not here, does not answer, or its configuration cannot be read.
        UserError: There is no such partition.
    """
    config = site_text.parse_config(_ask("scontrol", "show", "config"))
    everywhere = site_text.parse_partitions(_ask("scontrol", "show", "partition", "--oneliner"))
    chosen = _chosen(everywhere, partition)
    unknown = [f"{name} of scontrol show config" for name in site_text.lacking(config)]
    if config.job_submit:
        unknown.append(f"what JobSubmitPlugins={config.job_submit} changes of the job's options")
    nodes: tuple[Node, ...] = ()
    try:
        nodes = site_text.parse_nodes(_ask(*site_text.SINFO))
    except SchedulerError as error:
        unknown.append(f"nodes of the partition: {error}")
    qos: tuple[Qos, ...] | None = None
    if config.accounting:
        try:
            qos = site_text.parse_qos(_ask(*site_text.SACCTMGR))
        except SchedulerError as error:
            unknown.append(f"QOS: {error}")
    others = tuple(each for each in everywhere if each not in chosen)
    return Site(config, chosen, others, nodes, qos, tuple(unknown))


def _ask(*command: str) -> str:
    done = run_command(*command)
    if done.returncode:
        raise SchedulerError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _chosen(everywhere: tuple[Partition, ...], names: str | None) -> tuple[Partition, ...]:
    if names is None:
        found = tuple(each for each in everywhere if each.default)
        if not found:
            raise UserError(
                "the cluster has no default partition; name one in the profile: partition: "
                f"{' or '.join(each.name for each in everywhere)}"
            )
        return found
    by_name = {each.name: each for each in everywhere}
    for name in names.split(","):
        if name not in by_name:
            raise UserError(
                f"partition: {name!r} is none of this cluster's; there are "
                f"{', '.join(by_name) or 'none that you may see'}"
            )
    return tuple(by_name[name] for name in names.split(","))
