"""What else of a site touches a run: lost nodes, requeueing, tracking of processes, its memory."""

from collections.abc import Iterator

from qlora_dist import ends
from qlora_dist.diagnosis import Finding
from qlora_slurm.case import Case, number

# Exit codes of a batch process, and what a requeue by Slurm itself would do after each.
_CODES = {
    ends.DONE: "a run that is done",
    ends.FAILED: "a run that is given up",
    ends.USER_ERROR: "a run whose user has to mend something",
    ends.PREEMPTED: "a run that was cancelled",
    ends.TIME_LIMIT: "a run that was cancelled",
    ends.HANG: "a run that hung and is given up",
    ends.BAD_NODE: "a run that was given up on a bad node",
    ends.NEVER_RESTART: "a run whose loss is not a number",
}


def node_failure(case: Case) -> Iterator[Finding]:
    """A node is gone, and with it some of the ranks: no save can be made."""
    config = case.site.config
    silence = config.slurmd_timeout_s
    by = [f"SlurmdTimeout={number(silence)}", f"checkpoint.every_steps={case.every_steps}"]
    change = list(case.save_oftener())
    if silence == 0:
        what = (
            "Slurm never gives a silent node up, and a job whose first node dies stays as it is. "
        )
        change.append("ask the administrator for a SlurmdTimeout; until then: scontrol requeue JOB")
    else:
        what = f"Slurm notices after about {number(silence)} s and requeues the job, or its batch "
        what += "process does before, where that is alive. "
    what += "The run goes on from its last committed step."
    if config.return_to_service == 0:
        by.append("ReturnToService=0")
        what += " The node stays away until an administrator brings it back."
    yield Finding("node failure", what, tuple(by), case.most_lost, tuple(change))


def requeue(case: Case) -> Iterator[Finding]:
    """The way back into the queue."""
    config = case.site.config
    window, by = case.kill_wait()
    lost = case.can_lose(window)
    what = (
        f"An administrator's requeue: SIGTERM, and SIGKILL after KillWait. {case.verdict(window)}"
    )
    yield Finding("requeue", what, (by,), lost, case.save_oftener() if lost else ())
    if config.job_requeue is False:
        what = "Jobs here are not requeued unless they ask; the batch script does (--requeue)."
        yield Finding("requeue", what, ("JobRequeue=0",))
    if config.cred_expire_s is not None:
        seconds = number(config.cred_expire_s)
        what = f"A requeued job waits about {seconds} s before it may start again."
        yield Finding("requeue", what, (f"AuthInfo cred_expire={seconds}",))
    yield from _exit_codes(case)


def _exit_codes(case: Case) -> Iterator[Finding]:
    config = case.site.config
    for name, codes, does in (
        ("RequeueExit", config.requeue_exit, "starts again, by Slurm's own doing"),
        ("RequeueExitHold", config.requeue_exit_hold, "comes back into the queue and is held"),
    ):
        found = sorted((codes or frozenset()) & set(_CODES))
        for text in dict.fromkeys(_CODES[code] for code in found):
            same = [code for code in found if _CODES[code] == text]
            by = f"{name} has {', '.join(map(str, same))}"
            yield Finding("requeue", f"{text.capitalize()} {does}.", (by,), None, (_LEAVE,))


_LEAVE = "ask the administrator to leave those codes out; end such a job with scancel"


def processes(case: Case) -> Iterator[Finding]:
    """Who gets Slurm's signals, and whom it can end."""
    kind = case.site.config.proctrack
    if kind is None or not kind.endswith("pgid"):
        return
    what = (
        "Slurm's signals do not reach the ranks, which are in sessions of their own: the stop file "
        "does, through the batch process and the node's. What is killed may leave ranks behind, "
        "which end when their torchrun is gone; one that hangs drains the node (Kill task failed)."
    )
    wish = "ask the administrator for proctrack/cgroup"
    yield Finding("processes", what, (f"ProctrackType={kind}",), None, (wish,))


def status(case: Case) -> Iterator[Finding]:
    """How long Slurm remembers."""
    config = case.site.config
    if config.accounting is not False:
        return
    age = config.min_job_age_s
    what = (
        f"There is no sacct: Slurm knows a job for {number(age)} s after its end. qlora status and "
        "list read the run directory, and need no more."
    )
    by = ("AccountingStorageType=accounting_storage/none", f"MinJobAge={number(age)}")
    yield Finding("status", what, by)


def security(case: Case) -> Iterator[Finding]:
    """What others on the network can reach."""
    what = (
        "torch's rendezvous store listens on all interfaces of the first node, on a port of its "
        "own, without authentication, while the job runs. No process of a run unpickles what it "
        "gets there; whoever reaches the port can still end the run."
    )
    nodes = case.plan.topology.nodes
    wish = ("keep the nodes' network closed to other users",) if nodes > 1 else ()
    yield Finding("security", what, ("torch.distributed",), None, wish)
