"""Runs as Slurm jobs: the batch script, and handing it to sbatch through submitit."""

import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from qlora_dist.ends import RankEnd
from qlora_dist.errors import PlanError, RunDirError, UserError
from qlora_dist.layout import RunDir
from qlora_dist.plan import Plan
from qlora_dist.scheduler import comment_of, live_jobs
from qlora_slurm.site_profile import Profile, load_profile

_DEFAULT_TIME_MIN = 24 * 60
# sbatch(1), --signal: it may come up to 60 s early. A job then needs time to start and to train.
_EARLY_S, _START_S = 60, 60


class SlurmBackend:
    """Jobs of one task a node."""

    def files(self, plan: Plan, run_dir: Path) -> dict[str, str]:
        """The batch script, for the bundle.

        Raises:
            UserError: The profile is missing or wrong.
        """
        return {"batch.sh": batch_script(plan, run_dir)}

    def submit(self, run: RunDir, plan: Plan, *, say: Callable[[str], None]) -> RankEnd | None:
        """Send the run to the queue, once.

        Raises:
            RunDirError: A job of this run is in the queue already.
            UserError: There is no Slurm here, or it refuses the job.
        """
        if shutil.which("sbatch") is None:
            raise UserError(
                "resources.backend: slurm, and there is no sbatch on this machine; submit from a "
                "login node, or use resources.backend=local"
            )
        if jobs := live_jobs(run.root):
            raise RunDirError(
                f"{run.root} is in the queue already, as job {', '.join(jobs)}; end it with: "
                f"scancel {' '.join(jobs)}"
            )
        # Whoever submits a cancelled run wants it again, requeues and all.
        run.cancel_file.unlink(missing_ok=True)
        folder = run.control / "submitit"
        folder.mkdir(mode=0o700, exist_ok=True)
        executor = SlurmExecutor(folder)
        executor.update_parameters(**parameters(plan, run.root))
        try:
            # Not submit(): the job is ours, and nothing of it is pickled.
            job = executor._submit_command(command(run.root))
        except FailedJobError as error:
            raise UserError(f"sbatch refused the job: {_last_words(error)}") from error
        say(f"submitted job {job.job_id}: {plan.topology.nodes} node(s); follow it with: squeue")
        return None


def batch_script(plan: Plan, run_dir: Path) -> str:
    """The exact script that sbatch is given."""
    # submitit's own function, since a dry run must not need Slurm.
    text: str = _make_sbatch_string(
        command=command(run_dir),
        folder=run_dir / "control" / "submitit",
        **_converted(parameters(plan, run_dir)),
    )
    return text


def command(run_dir: Path) -> str:
    """What the batch script becomes: the batch process, with no shell around it."""
    return "exec " + shlex.join([sys.executable, "-m", "qlora_dist.batch", str(run_dir)])


def parameters(plan: Plan, run_dir: Path) -> dict[str, Any]:
    """What submitit is told.

    Raises:
        UserError: The profile is missing or wrong.
    """
    spec = plan.spec
    profile = load_profile(spec.resources.profile)
    if any(character in str(run_dir) for character in "\n|%\\"):
        # sbatch reads % in file names as patterns, and squeue's answer is read line by line.
        raise PlanError(f"run_dir: {str(run_dir)!r} holds a newline, |, % or \\; Slurm cannot")
    minutes = time_limit_min(plan)
    if 60 * minutes < profile.signal_lead_s + _EARLY_S + _START_S:
        least = -(-(profile.signal_lead_s + _EARLY_S + _START_S) // 60)
        raise PlanError(
            f"resources.time: {minutes} min leave nothing to train before the warning that "
            f"signal_lead_s={profile.signal_lead_s} asks for, which may come a minute early; use "
            f"at least 0:{least:02d}:00"
        )
    named = ("partition", "account", "qos", "constraint", "exclude")
    values: dict[str, Any] = {
        "job_name": spec.name,
        "nodes": plan.topology.nodes,
        "time": minutes,
        "cpus_per_task": _cpus(plan),
        "use_srun": False,
        "stderr_to_stdout": True,
        "setup": _setup(profile),
        **{name: value for name in named if (value := getattr(profile, name)) is not None},
        "additional_parameters": {
            "ntasks-per-node": 1,
            "requeue": True,
            "comment": comment_of(run_dir),
            "output": str(run_dir / "control" / "slurm-%j.out"),
            # To the batch process alone: no signal crosses torchrun.
            "signal": f"B:USR1@{profile.signal_lead_s}",
            **({"reservation": profile.reservation} if profile.reservation else {}),
            **({"mem": f"{int(profile.mem_gb * 1024)}M"} if profile.mem_gb else {}),
            **profile.sbatch,
        },
    }
    if plan.topology.device == "cuda":
        values["gpus_per_node"] = plan.topology.processes_per_node
    return values


def _converted(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _setup(profile: Profile) -> list[str]:
    env = dict(profile.env)
    if profile.network_interface is not None:
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            env.setdefault(name, profile.network_interface)
    return [
        # Until the batch process handles them; what is ignored now cannot end it before.
        "trap '' TERM USR1 USR2",
        *(f"export {name}={shlex.quote(value)}" for name, value in env.items()),
        *profile.setup,
    ]


def _cpus(plan: Plan) -> int | None:
    each = plan.spec.resources.cpus_per_process
    return None if each is None else each * plan.topology.processes_per_node


def time_limit_min(plan: Plan) -> int:
    """Time limit of a run's jobs, in minutes, which is how Slurm counts."""
    text = plan.spec.resources.time
    if text is None:
        return _DEFAULT_TIME_MIN
    days, _, clock = text.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    total = (int(days or 0) * 24 + hours) * 60 + minutes + (1 if seconds else 0)
    return max(1, total)


def _last_words(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if "sbatch: error:" in line]
    return "; ".join(line.partition("sbatch: error: ")[2] for line in lines) or str(error)
