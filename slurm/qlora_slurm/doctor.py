"""``qlora doctor``: what a cluster, as it is set, will do to a run."""

from collections.abc import Callable, Iterator

from qlora_dist.diagnosis import Diagnosis, Finding
from qlora_dist.ledger import Measured
from qlora_dist.plan import Plan
from qlora_slurm import stops, submission, surroundings
from qlora_slurm.ask import read_site
from qlora_slurm.case import Case
from qlora_slurm.site_facts import Site
from qlora_slurm.site_profile import load_profile

# In the order in which a person reads them.
RULES: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    submission.submission,
    stops.preemption,
    stops.time_limit,
    surroundings.node_failure,
    stops.cancel,
    surroundings.requeue,
    surroundings.processes,
    surroundings.status,
    surroundings.security,
)


class SlurmDoctor:
    """Reads the cluster that this machine is a client of."""

    def examine(self, plan: Plan, measured: Measured | None, step_s: float | None) -> Diagnosis:
        """Say what will happen to a run here.

        Args:
            plan: The run's.
            measured: What a stop of it takes; None before it has run.
            step_s: Its shortest step, in seconds; None before.

        Raises:
            SchedulerError: Slurm is not here, or does not answer.
            UserError: The profile, or the partition that it names, is not there.
        """
        profile = load_profile(plan.spec.resources.profile)
        site = read_site(profile.partition)
        case = Case(site, plan, profile, measured, step_s)
        return Diagnosis(
            site=_line(site),
            measured=measured,
            signal_lead_s=case.proposed_lead_s(),
            findings=diagnose(case),
            unknown=site.unknown,
        )


def diagnose(case: Case) -> tuple[Finding, ...]:
    """Everything that there is to say of a run on a site; pure."""
    return tuple(finding for rule in RULES for finding in rule(case))


def _line(site: Site) -> str:
    config, names = site.config, ", ".join(each.name for each in site.partitions)
    nodes = len({node.name for node in site.nodes if node.partition in names.split(", ")})
    size = f", {nodes} node(s)" if site.nodes else ""
    return f"cluster {config.cluster}, Slurm {config.version}, partition {names}{size}"
