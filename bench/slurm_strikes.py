"""Faults that a job of a real Slurm can meet, and how each is done to it."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dist import ends
from qlora_dist.layout import RunDir
from qlora_testbed import Testbed

# Steps that the run has behind it when the fault strikes.
STRIKE_AFTER = 13
# From the start of a run to its end, requeues and all, on a machine that does other things too.
PATIENCE_S = 300


@dataclass(frozen=True)
class Fault:
    """What happens to a job.

    Attributes:
        strike: Does it, given the test's own view of the run.
        codes: How the first attempt may end.
        lossless: Whether there is time to save every complete step.
        early: Whether it strikes before the job starts.
        env: Variables of the submitting shell.
        spec: Changes of the config.
        site: Changes of the profile.
    """

    strike: Callable[["Struck"], None]
    codes: tuple[int, ...]
    lossless: bool = True
    early: bool = False
    env: tuple[tuple[str, str], ...] = ()
    spec: tuple[tuple[str, Any], ...] = ()
    site: tuple[tuple[str, Any], ...] = ()


@dataclass
class Struck:
    """A run to strike, on its testbed."""

    testbed: Testbed
    run: RunDir
    job: str

    def rank_pid(self, rank: int) -> int:
        """Process id of a rank of the first attempt."""
        tree = json.loads(self.run.rank_file(0, rank).read_text())
        return int(tree["process"]["pid"])


def preempt(at: Struck) -> None:
    """A job of a higher partition wants both nodes."""
    at.testbed.run("sbatch", "-phigh", "-N2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def shorten(at: Struck) -> None:
    """The time limit comes nearer, for this execution: about a minute is left.

    The ranks are so slow that they would meet it.
    """
    with ranks_frozen(at):
        at.testbed.run("scontrol", "update", f"JobId={at.job}", f"TimeLimit={minutes_run(at) + 2}")
        wait_until(at.run.stop_file(0).exists)
    record = at.run.attempt(0) / "attempt.json"
    wait_until(lambda: "ended_at" in record.read_text())
    at.testbed.run("scontrol", "update", f"JobId={at.job}", "TimeLimit=20")


@contextlib.contextmanager
def ranks_frozen(at: Struck) -> Iterator[None]:
    """However fast the machine is, the run does not end meanwhile."""
    pids = [at.rank_pid(rank) for rank in range(2)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def minutes_run(at: Struck) -> int:
    """Whole minutes that the job has run."""
    line = at.testbed.run("squeue", "--noheader", "--format=%M", f"--job={at.job}").strip()
    return int(line.rpartition(":")[0].rpartition(":")[2] or 0)


def clients(*command: str) -> Callable[[Struck], None]:
    """A command of a user or of an administrator, about the job."""
    return lambda at: at.testbed.run(*command, at.job) and None


def fail_node(at: Struck) -> None:
    """A node dies with all that is on it, and comes back after a while."""
    at.testbed.kill_node("n2")
    time.sleep(12)
    at.testbed.start_node("n2")


def kill_rank(at: Struck) -> None:
    """Out of memory, say."""
    os.kill(at.rank_pid(1), signal.SIGKILL)


def freeze_rank(at: Struck) -> None:
    """A rank that does nothing more, not even beat."""
    os.kill(at.rank_pid(1), signal.SIGSTOP)


def kill_torchrun(at: Struck) -> None:
    """The ranks' parent goes, and the ranks are left."""
    stat = Path(f"/proc/{at.rank_pid(1)}/stat").read_text()
    os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)


def lose_controller(at: Struck) -> None:
    """Preempted, and nobody answers when the job wants to be requeued."""
    with contextlib.ExitStack() as away:
        with ranks_frozen(at):
            at.testbed.run("scancel", "--signal=TERM", at.job)
            # scancel does not wait: daemons that end right after it take the signal with them.
            wait_until(at.run.stop_file(0).exists)
            away.enter_context(at.testbed.controller_away())
        time.sleep(8)


def spoil_node(at: Struck) -> None:
    """The first node cannot write into the run directory, for where it would there is a folder."""
    (at.run.control / "probe-n1").mkdir()


def nothing(_: Struck) -> None:
    """The fault is in the run itself."""


STOPPED = (ends.PREEMPTED, ends.TIME_LIMIT)
FAULTS = {
    "preempted": Fault(preempt, STOPPED),
    "preempted, --no-requeue": Fault(preempt, STOPPED, site=(("sbatch", {"no-requeue": True}),)),
    "time limit, warned": Fault(shorten, (ends.TIME_LIMIT,)),
    "time limit, own clock": Fault(
        shorten, (ends.TIME_LIMIT,), site=(("sbatch", {"signal": "B:CONT@1"}),)
    ),
    "scancel --signal=TERM": Fault(clients("scancel", "--signal=TERM"), STOPPED),
    "scancel --signal=USR1 --batch": Fault(clients("scancel", "--signal=USR1", "--batch"), STOPPED),
    "scontrol requeue": Fault(clients("scontrol", "requeue"), STOPPED),
    "controller away": Fault(lose_controller, STOPPED),
    "node fails": Fault(fail_node, (), lossless=False),
    "bad node": Fault(
        spoil_node,
        (ends.BAD_NODE,),
        early=True,
        spec=(("resources__nodes", 1), ("resources__processes_per_node", 2)),
        site=(("sbatch", {"begin": "now+5"}),),
    ),
    "rank killed": Fault(kill_rank, (ends.FAILED,), lossless=False),
    "torchrun killed": Fault(kill_torchrun, (*STOPPED, ends.FAILED), lossless=False),
    "rank frozen": Fault(
        freeze_rank, (ends.HANG,), lossless=False, spec=(("resources__timeout_s", 25),)
    ),
    "rank hangs": Fault(
        nothing,
        (ends.HANG,),
        lossless=False,
        env=(("QLORA_FAULT", f"accumulation#{STRIKE_AFTER * 16}@1~0=hang"),),
        spec=(("resources__timeout_s", 25),),
    ),
    "exception": Fault(
        nothing,
        (ends.FAILED,),
        lossless=False,
        env=(("QLORA_FAULT", f"accumulation#{STRIKE_AFTER * 16}@1~0=exception"),),
    ),
}


def wait_until(condition: Callable[[], Any]) -> Any:
    """What the condition gives, once it gives something."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        if time.monotonic() > deadline:
            return None
        time.sleep(0.3)
    return found
