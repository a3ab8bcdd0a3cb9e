"""What Slurm knows of a job, asked with a time limit.

``scontrol`` is asked first, since it needs no accounting; a job that it has forgotten is over.
"""

import json
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_dist.errors import QLoRAError, RunDirError
from qlora_dist.layout import RunDir
from qlora_dist.process import Process

# A controller that is busy answers within seconds; one that is gone never does.
_TIMEOUT_S = 30.0
# A user's own: another format, other jobs, other times.
_TASTES = ("SQUEUE_", "SINFO_", "SACCT_", "SLURM_TIME_FORMAT", "SLURM_BITSTR_LEN")
# squeue(1), JOB STATE CODES: those in which a job may still run, or run again.
_LIVE = frozenset(
    {
        *("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED"),
        *("REQUEUE_HOLD", "REQUEUE_FED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"),
    }
)


class SchedulerError(QLoRAError):
    """Slurm did not answer, or refused."""


@dataclass(frozen=True)
class SlurmJob:
    """One execution of a job: its id (``ARRAY_ELEMENT`` in an array), and its requeues before."""

    job: str
    restart: int

    @classmethod
    def this(cls, env: Mapping[str, str] = os.environ) -> "SlurmJob":
        """The job that this process runs in."""
        job = env["SLURM_JOB_ID"]
        # One element's SLURM_JOB_ID may be the whole array's: requeueing it would requeue all.
        if "SLURM_ARRAY_TASK_ID" in env:
            job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
        return cls(job, int(env.get("SLURM_RESTART_COUNT", "0")))

    def is_gone(self) -> bool:
        """Whether this execution is over, by the scheduler's word.

        Raises:
            SchedulerError: The scheduler does not answer.
        """
        seen = show_job(self.job)
        return seen is None or not seen.is_live or seen.restarts != self.restart


@dataclass(frozen=True)
class JobView:
    """A job as scontrol shows it.

    Attributes:
        state: Such as RUNNING.
        reason: Such as None, TimeLimit, Resources.
        restarts: How often it was requeued.
        requeue: Whether it may be.
        nodes: Node list, as Slurm writes it; empty while it waits.
        start_time: When it started, or is expected to, in seconds since the epoch; None if Slurm
            does not say.
        end_time: When its time is over; None if it has no limit, or has not started.
        preempted: Whether this execution has been told to make room.
        excluded: Nodes that it leaves out, as Slurm writes them.
        partition: Where it is, or waits.
    """

    state: str
    reason: str
    restarts: int
    requeue: bool
    nodes: str
    start_time: float | None = None
    end_time: float | None = None
    preempted: bool = False
    excluded: str = ""
    partition: str = ""

    @property
    def is_live(self) -> bool:
        """Whether it runs, or may run again."""
        return self.state in _LIVE


def read_owner(path: Path) -> "SlurmJob | Process | None":
    """Who an owner.json names; None where there is none.

    Raises:
        TypeError: It is damaged.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise TypeError(f"{path} is no JSON") from None
    return SlurmJob(**tree) if "job" in tree else Process(**tree)


def show_job(job: str) -> JobView | None:
    """A job; None for one that the controller does not know, or has forgotten.

    Raises:
        SchedulerError: The controller does not answer.
    """
    done = run_command("scontrol", "show", "job", "--oneliner", job)
    if done.returncode == 0:
        return parse_job(done.stdout)
    if "Invalid job id" in done.stderr:
        return None
    raise SchedulerError(_unanswered(f"scontrol show job {job}", done.stderr))


def parse_job(text: str) -> JobView:
    """Read one line of ``scontrol show job --oneliner``.

    Raises:
        SchedulerError: It is none.
    """
    # The first of each: a comment at the end may hold anything.
    fields = dict(reversed(re.findall(r"(\w+)=(\S*)", text)))
    try:
        return JobView(
            state=fields["JobState"],
            reason=fields["Reason"],
            restarts=int(fields["Restarts"]),
            requeue=fields["Requeue"] == "1",
            nodes="" if fields.get("NodeList") == "(null)" else fields.get("NodeList", ""),
            start_time=_time(fields.get("StartTime", "")),
            end_time=_time(fields.get("EndTime", "")),
            # It stays after a requeue.
            preempted=(_time(fields.get("PreemptTime", "")) or 0.0)
            >= (_time(fields.get("StartTime", "")) or float("inf")),
            excluded=fields.get("ExcNodeList", "").replace("(null)", ""),
            partition=fields.get("Partition", ""),
        )
    except (KeyError, ValueError) as error:
        raise SchedulerError(f"scontrol's answer lacks {error}: {text[:200]}") from None


def _time(text: str) -> float | None:
    """A time of this machine's zone, as Slurm writes it."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def run_command(
    *args: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs.

    Raises:
        SchedulerError: It is not here, or does not answer.
    """
    env = os.environ if env is None else env
    conf = env.get("SLURM_CONF")
    if conf and not Path(conf).exists():
        # The programs would look for it elsewhere, for longer than anybody waits.
        raise SchedulerError(f"SLURM_CONF names {conf}, which is not there; unset it, or mend it")
    try:
        return subprocess.run(
            args,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            env=_plain(env),
        )
    except FileNotFoundError:
        raise SchedulerError(f"{args[0]} is not on this machine; run this where Slurm is") from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{args[0]} did not answer within {_TIMEOUT_S:.0f} s") from None


def _unanswered(command: str, stderr: str) -> str:
    """Why a question has no answer, in one line."""
    words = re.sub(r"^\w+: (error: )?", "", (stderr.strip().splitlines() or ["no answer"])[0])
    hint = "" if "SLURM_CONF" in os.environ else "; SLURM_CONF is not set in this shell"
    # Without a slurm.conf they look for one in DNS.
    unset = "config" in words or "resolve_ctls" in words
    return f"Slurm cannot be read: {command}: {words}{hint if unset else ''}"


def _plain(env: Mapping[str, str]) -> dict[str, str]:
    """An environment without what changes how Slurm's programs print."""
    return {name: value for name, value in env.items() if not name.startswith(_TASTES)}


def requeue(job: str) -> None:
    """Put a running job back into the queue.

    Raises:
        SchedulerError: Slurm refused.
    """
    done = run_command("scontrol", "requeue", job)
    if done.returncode:
        raise SchedulerError(f"scontrol requeue {job}: {done.stderr.strip()}")


def update_job(job: str, **values: str) -> None:
    """Change a job that waits, such as ``StartTime="now+60"``.

    Raises:
        SchedulerError: Slurm refused.
    """
    words = [f"{name}={value}" for name, value in values.items()]
    done = run_command("scontrol", "update", f"JobId={job}", *words)
    if done.returncode:
        raise SchedulerError(f"scontrol update {job} {' '.join(words)}: {done.stderr.strip()}")


def follow_instead(job: str, new: str) -> None:
    """Have the caller's jobs that wait for a job's good end wait for another's.

    Raises:
        SchedulerError: Slurm refused.
    """
    done = run_command("squeue", "--me", "--array", "--noheader", "--format=%i|%E")
    if done.returncode:
        raise SchedulerError(_unanswered("squeue", done.stderr))
    for line in done.stdout.splitlines():
        waits, _, needs = line.strip().partition("|")
        # Such as afterok:7(unfulfilled),afterany:9_*(unfulfilled).
        before = re.sub(r"\(\w+\)", "", needs)
        after = re.sub(rf"\bafterok:{job}(?![\w*])", f"afterok:{new}", before)
        if after != before:
            update_job(waits, Dependency=after)


def ends_the_preempted(partition: str) -> bool:
    """Whether a partition's jobs are ended when they are preempted, and not requeued.

    Raises:
        SchedulerError: The controller does not answer.
    """
    done = run_command("scontrol", "show", "partition", "--oneliner", partition)
    if done.returncode:
        raise SchedulerError(f"scontrol show partition {partition}: {done.stderr.strip()}")
    return "PreemptMode=CANCEL" in done.stdout


def comment_of(folder: Path, sweep: str = "") -> str:
    """What marks a job as one of a run's, or of a sweep's, in squeue."""
    return f"qlora:{folder.resolve()}" + (f"#{sweep}" if sweep else "")


def live_jobs(run_dir: Path) -> Sequence[str]:
    """Ids of the caller's own jobs of a run that are not over.

    Raises:
        SchedulerError: The controller does not answer.
    """
    return Queue.read().jobs_of(run_dir)


def refuse_queued(run: RunDir) -> None:
    """Refuse a run that was once submitted and has a job in the queue.

    Raises:
        RunDirError: It has.
        SchedulerError: The controller does not answer.
    """
    if run.submitted_json.exists() and (jobs := live_jobs(run.root)):
        raise RunDirError(
            f"{run.root} is in the queue already, as job {', '.join(jobs)}; end it with: "
            f"qlora cancel {run.root}"
        )


@dataclass(frozen=True)
class Queue:
    """The caller's own jobs that are not over.

    Attributes:
        jobs: Id (``ARRAY_ELEMENT`` in an array) and comment of each.
    """

    jobs: Sequence[tuple[str, str]]

    @classmethod
    def read(cls) -> "Queue":
        """Ask Slurm.

        Raises:
            SchedulerError: The controller does not answer.
        """
        done = run_command("squeue", "--me", "--array", "--noheader", "--format=%i|%k")
        if done.returncode:
            raise SchedulerError(_unanswered("squeue", done.stderr))
        rows = (line.strip().partition("|") for line in done.stdout.splitlines())
        return cls([(job, said) for job, _, said in rows])

    def jobs_of(self, run_dir: Path) -> Sequence[str]:
        """Ids of a run's jobs; an element's, if the run is one of a sweep."""
        return [job for job, said in self.jobs if _is_of(run_dir, job, said)]


def _is_of(run_dir: Path, job: str, said: str) -> bool:
    if said == comment_of(run_dir):
        return True
    try:
        tree = json.loads(RunDir(run_dir).element_json.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # The element of the sweep that it was last submitted in.
    return said == comment_of(run_dir.parent, tree["sweep"]) and (
        job.partition("_")[2] == str(tree["element"])
    )
