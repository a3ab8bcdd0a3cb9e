"""What sbatch is given: the batch script of a run, or of an array of runs."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import _make_sbatch_string

from qlora_dist.code_tree import path_env
from qlora_dist.errors import PlanError
from qlora_dist.plan import Plan
from qlora_dist.process_env import PASS_ENV
from qlora_dist.scheduler import comment_of
from qlora_slurm.site_profile import Profile, load_profile

_DEFAULT_TIME_MIN = 24 * 60
# sbatch(1), --signal: it may come up to 60 s early. A job then needs time to start and to train.
_EARLY_S, _START_S = 60, 60


@dataclass(frozen=True)
class Job:
    """What is submitted at once.

    Attributes:
        plan: What each run takes.
        folder: The run's directory, or the folder of all.
        runs: Run directories, one for each element of the array.
        parallel: Elements that may run at once; None for a job that is no array.
        after: Jobs that must end well first.
        sweep: What tells this array from others of the same folder; empty for none.
    """

    plan: Plan
    folder: Path
    runs: tuple[Path, ...]
    parallel: int | None = None
    after: tuple[str, ...] = ()
    sweep: str = ""

    @property
    def profile(self) -> Profile:
        """The cluster profile.

        Raises:
            UserError: It is missing or wrong.
        """
        return load_profile(self.plan.spec.resources.profile)


def batch_script(job: Job) -> str:
    """The exact script that sbatch is given.

    Raises:
        UserError: The profile is missing or wrong.
    """
    # submitit's own function, since a dry run must not need Slurm.
    text: str = _make_sbatch_string(
        command=command(job), folder=job.folder / "control" / "submitit", **parameters(job)
    )
    return text


def command(job: Job) -> str:
    """What the batch script becomes: the batch process, with no shell around it."""
    argv = [sys.executable, "-m", "qlora_dist.batch", str(job.profile.signal_lead_s)]
    return f'exec {shlex.join(argv)} "$run"'


def pass_env(job: Job) -> list[str]:
    """Variables beyond the allow-list that the job gets: the spec's, and what a profile sets."""
    return [*job.plan.spec.resources.pass_env, *job.profile.env]


def parameters(job: Job) -> dict[str, Any]:
    """What submitit is told.

    Raises:
        UserError: The profile is missing or wrong.
    """
    spec, profile = job.plan.spec, job.profile
    for path in (job.folder, *job.runs):
        if any(character in str(path) for character in "\n|%\\"):
            # sbatch reads % in file names as patterns, and squeue's answer is read line by line.
            raise PlanError(f"run_dir: {str(path)!r} holds a newline, |, % or \\; Slurm cannot")
    named = ("partition", "account", "qos", "constraint", "exclude")
    values: dict[str, Any] = {
        "job_name": spec.name,
        "nodes": job.plan.topology.nodes,
        "time": _enough(time_limit_min(job.plan, profile), profile),
        "cpus_per_task": profile.cpus or _cpus(job.plan),
        # submitit's own would be "submitit", which a site that checks such keys refuses.
        "wckey": None,
        "use_srun": False,
        "stderr_to_stdout": True,
        "setup": [*_setup(profile), *_run_lines(job)],
        **{name: value for name in named if (value := getattr(profile, name)) is not None},
        "additional_parameters": {
            "ntasks-per-node": 1,
            # submitit sorts a profile's own word on it before this one, which would then hold.
            **({} if "no-requeue" in profile.sbatch else {"requeue": True}),
            "comment": comment_of(job.folder, job.sweep),
            "output": str(job.folder / "control" / "slurm-%j.out"),
            # To the batch process alone: no signal crosses torchrun.
            "signal": f"B:USR1@{profile.signal_lead_s}",
            **_optional(job, profile),
            **profile.sbatch,
        },
    }
    if job.plan.topology.device == "cuda" and profile.gres is None:
        values["gpus_per_node"] = job.plan.topology.processes_per_node
    return values


def _optional(job: Job, profile: Profile) -> dict[str, str | int]:
    found: dict[str, str | int] = {}
    if profile.reservation:
        found["reservation"] = profile.reservation
    if profile.gres:
        found["gres"] = profile.gres
    if profile.mem_gb:
        found["mem"] = f"{int(profile.mem_gb * 1024)}M"
    if profile.mail_user:
        found |= {"mail-user": profile.mail_user, "mail-type": profile.mail_type}
    if job.parallel is not None:
        found["array"] = f"0-{len(job.runs) - 1}%{job.parallel}"
    if job.after:
        found["dependency"] = "afterok:" + ":".join(job.after)
    return found


def _setup(profile: Profile) -> list[str]:
    env = dict(profile.env)
    if env:
        # What a profile sets, a process gets.
        env[PASS_ENV] = " ".join(profile.env)
    if profile.local_dir is not None:
        env["QLORA_LOCAL_DIR"] = profile.local_dir
    if profile.network_interface is not None:
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            env.setdefault(name, profile.network_interface)
    return [
        # Until the batch process handles them; what is ignored now cannot end it before.
        "trap '' TERM USR1 USR2",
        *(f"export {name}={shlex.quote(value)}" for name, value in env.items()),
        *profile.setup,
    ]


def _run_lines(job: Job) -> list[str]:
    """Which run it is, and its own code before what earlier lines have put on Python's path."""
    # Whatever is wrong with a name is said here.
    names = {tuple(sorted(path_env(run))) for run in job.runs}
    assert names == {("PYTHONPATH", "PYTHONSAFEPATH")}
    return [
        f"runs=({' '.join(shlex.quote(str(run)) for run in job.runs)})",
        'run="${runs[${SLURM_ARRAY_TASK_ID:-0}]}"',
        'export PYTHONPATH="$run/code${PYTHONPATH:+:$PYTHONPATH}"',
        "export PYTHONSAFEPATH=1",
    ]


def _cpus(plan: Plan) -> int | None:
    each = plan.spec.resources.cpus_per_process
    return None if each is None else each * plan.topology.processes_per_node


def time_limit_min(plan: Plan, profile: Profile) -> int:
    """Time limit of a run's jobs, in minutes, which is how Slurm counts."""
    text = plan.spec.resources.time or profile.time
    if text is None:
        return _DEFAULT_TIME_MIN
    days, _, clock = text.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return (int(days or 0) * 24 + hours) * 60 + minutes + (1 if seconds else 0)


def _enough(total: int, profile: Profile) -> int:
    least = -(-(profile.signal_lead_s + _EARLY_S + _START_S) // 60)
    if total < least:
        raise PlanError(
            f"resources.time: {total} min leave nothing to train before the warning that "
            f"signal_lead_s={profile.signal_lead_s} asks for, which may come a minute early; use "
            f"at least 0:{least:02d}:00"
        )
    return total
