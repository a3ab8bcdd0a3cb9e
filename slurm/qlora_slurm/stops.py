"""What a signal leaves time for: preemption, the time limit, scancel, an administrator's requeue.

What arrives when was measured on Slurm 22.05: docs/slurm.md.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from qlora_dist.diagnosis import TEARDOWN_S, Finding, clock_s, stop_s
from qlora_slurm.case import Case, duration, number
from qlora_slurm.site_facts import Partition

_UNKNOWN_MODE = "Jobs may be preempted, and what becomes of them then is not known."


@dataclass(frozen=True)
class _Preemption:
    """How one partition's jobs are preempted.

    Attributes:
        mode: OFF, REQUEUE, CANCEL or SUSPEND; None where it cannot be told.
        grace_s: GraceTime; None as mode.
        by: What decided it.
        whose: Where an administrator would change it.
        why: What there is to say where it is OFF or unknown.
    """

    mode: str | None
    grace_s: float | None
    by: tuple[str, ...]
    whose: str
    why: str = ""


def preemption(case: Case) -> Iterator[Finding]:
    """A job that matters more wants the nodes."""
    for partition in case.site.partitions:
        way = _way(case, partition)
        if way.mode is None:
            yield Finding("preemption", way.why, way.by, case.most_lost, case.save_oftener())
        elif way.mode == "OFF":
            yield Finding("preemption", way.why, way.by, 0)
        elif way.mode == "SUSPEND":
            yield _suspended(case, way)
        elif way.mode == "CANCEL":
            yield _cancelled(case, way)
        else:
            yield _requeued(case, way)


def _way(case: Case, partition: Partition) -> _Preemption:
    kind = case.site.config.preempt_type
    if kind is None:
        return _Preemption(None, None, (), "", "Whether jobs are preempted is not known.")
    by = f"PreemptType={kind}"
    if kind == "preempt/none":
        return _Preemption("OFF", 0, (by,), "", "No job is preempted on this cluster.")
    if kind == "preempt/partition_prio":
        return _by_partition(case, partition)
    if kind == "preempt/qos":
        return _by_qos(case, partition)
    return _Preemption(None, None, (by,), "", "What this plugin does to a job is not known.")


def _by_partition(case: Case, partition: Partition) -> _Preemption:
    mode, at = case.site.config.preempt_mode, f"of partition {partition.name}"
    by = f"PreemptMode={mode} of the cluster"
    if partition.preempt_mode is not None:
        mode, by = partition.preempt_mode, f"PreemptMode={partition.preempt_mode} {at}"
    if mode is None:
        return _Preemption(None, None, (by,), "", _UNKNOWN_MODE)
    if mode == "OFF":
        return _Preemption("OFF", 0, (by,), "", f"Jobs {at} are not preempted.")
    if not (rivals := case.rivals(partition)):
        tier = f"PriorityTier={partition.tier} {at}"
        text = "No partition of a higher tier shares its nodes: nothing preempts the job."
        return _Preemption("OFF", 0, (tier,), "", text)
    tiers = f"PriorityTier of {', '.join(rivals)} over {partition.tier} {at}"
    grace = f"GraceTime={number(partition.grace_s)} {at}"
    return _Preemption(mode, partition.grace_s, (by, grace, tiers), f"partition {partition.name}")


def _by_qos(case: Case, partition: Partition) -> _Preemption:
    kind = "PreemptType=preempt/qos"
    named = {qos.name: qos for qos in case.site.qos or ()}
    name = case.profile.qos
    if case.site.qos is None or name is None:
        lacks = "no QOS can be read" if name else "the profile names no qos"
        text = f"Jobs are preempted by QOS, and {lacks}: grace and mode are not known."
        return _Preemption(None, None, (kind,), "", text)
    if name not in named:
        text = f"Jobs are preempted by QOS, and this cluster has no qos {name!r}."
        return _Preemption(None, None, (kind,), "", text)
    qos, at = named[name], f"of QOS {name}"
    mode = qos.preempt_mode or case.site.config.preempt_mode
    by = f"PreemptMode={mode} {at if qos.preempt_mode else 'of the cluster'}"
    rivals = [each.name for each in named.values() if name in each.preempts]
    if mode == "OFF" or not rivals:
        text = f"No QOS preempts {name}: nothing preempts the job."
        return _Preemption("OFF", 0, (kind, by), "", text)
    if mode is None:
        return _Preemption(None, None, (kind, by), "", _UNKNOWN_MODE)
    grace = f"GraceTime={number(qos.grace_s)} {at}"
    return _Preemption(
        mode, qos.grace_s, (by, grace, f"Preempt of QOS {', '.join(rivals)}"), f"QOS {name}"
    )


def _window(case: Case, way: _Preemption) -> float | None:
    wait = case.site.config.kill_wait_s
    return None if wait is None or way.grace_s is None else wait + way.grace_s


def _told(case: Case, way: _Preemption) -> str:
    if not way.grace_s:
        return "SIGTERM comes at once, and SIGKILL after KillWait."
    who = "batch process is told at once (SIGUSR1)"
    if not case.site.config.user_signal:
        who = "processes are told at once (SIGTERM)"
    return f"The {who}, and SIGKILL comes after grace and KillWait."


def _requeued(case: Case, way: _Preemption) -> Finding:
    window = _window(case, way)
    lost = case.can_lose(window)
    change: tuple[str, ...] = ()
    if lost and case.measured is not None:
        grace = math.ceil(stop_s(case.measured) - (case.site.config.kill_wait_s or 0))
        wish = f"ask the administrator for GraceTime={grace} of {way.whose}"
        change = (wish, *case.save_oftener())
    what = f"{_told(case, way)} The job goes back into the queue. {case.verdict(window)}"
    return Finding("preemption", what, (*way.by, case.kill_wait()[1]), lost, change)


def _cancelled(case: Case, way: _Preemption) -> Finding:
    window, by = _window(case, way), (*way.by, case.kill_wait()[1])
    lost, resume = case.can_lose(window), "after such an end: qlora resume RUN"
    wish = f"ask the administrator for PreemptMode=REQUEUE of {way.whose}"
    within = "the grace" if way.grace_s else "KillWait"
    what = (
        f"{_told(case, way)} Slurm does not requeue the job; its batch process does, if all is "
        f"saved and ended within {within}. {case.verdict(window)}"
    )
    if case.measured is None or window is None:
        return Finding("preemption", what, by, lost, (wish, resume))
    needed = stop_s(case.measured) + TEARDOWN_S
    if needed <= (way.grace_s or window):
        return Finding("preemption", what, by, lost)
    longer = f"ask the administrator for GraceTime={math.ceil(needed)} of {way.whose}"
    return Finding("preemption", what, by, lost, (wish, longer, resume))


def _suspended(case: Case, way: _Preemption) -> Finding:
    limit = case.plan.spec.resources.timeout_s
    what = (
        "The job is stopped where it is and goes on later: nothing is lost, and its memory on the "
        f"GPUs stays taken. One that was suspended for longer than resources.timeout_s={limit} may "
        "find its collectives timed out, and then goes on from its last committed step."
    )
    return Finding("preemption", what, (*way.by, f"resources.timeout_s={limit}"), case.most_lost)


def time_limit(case: Case) -> Iterator[Finding]:
    """The job has had its time."""
    config, lead = case.site.config, case.profile.signal_lead_s
    if "signal" in case.profile.sbatch:
        text = "The profile's sbatch.signal replaces the launcher's own: its lead is not judged."
        theirs = f"sbatch.signal={case.profile.sbatch['signal']}"
        yield Finding("time limit", text, (theirs,), case.most_lost, ("use signal_lead_s instead",))
        return
    for partition in case.site.partitions:
        over, at = partition.over_time_limit_s, f"of partition {partition.name}"
        if over is None:
            over, at = config.over_time_limit_s, "of the cluster"
        wait, kill_wait = case.kill_wait()
        clock = clock_s(case.measured)
        window = None if over is None or wait is None else max(lead, clock) + over + wait
        what = (
            f"The batch process is told (SIGUSR1) {lead} to {lead + 60} s before the limit, and "
            f"acts by its own clock {clock:.0f} s before; the run saves and goes back into the "
            f"queue. {case.verdict(window)}"
        )
        proposed, lost = case.proposed_lead_s(), case.can_lose(window)
        change: list[str] = []
        if proposed is not None and lead < proposed:
            change.append(f"signal_lead_s: {proposed} in the profile")
        if case.measured is not None and case.time_s < max(lead, clock) + case.measured.save_s:
            what += (
                f" But {case.time_s} s is a short time: until its first save has ended, a run does "
                "not know how long one takes."
            )
            lost = case.most_lost
            enough = max(lead, clock) + 2 * case.measured.save_s + TEARDOWN_S
            change.append(f"resources.time={duration(60 * math.ceil(enough / 60))} or more")
        by = (f"signal_lead_s={lead}", kill_wait, f"OverTimeLimit={_minutes(over)} {at}")
        yield Finding("time limit", what, by, lost, tuple(change))


def _minutes(seconds: float | None) -> str:
    return number(None if seconds is None else seconds / 60)


def cancel(case: Case) -> Iterator[Finding]:
    """Somebody has had enough."""
    window, by = case.kill_wait()
    lost = case.can_lose(window)
    yield Finding("cancel", "qlora cancel: the run saves, however long it takes, and ends.", (), 0)
    what = f"scancel: SIGTERM to all, SIGKILL after KillWait; not undone. {case.verdict(window)}"
    change = ("use qlora cancel RUN",) if lost else ()
    yield Finding("cancel", what, (by,), lost, change)
