"""Runs as Slurm jobs: the batch script, and handing it to sbatch through submitit."""

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from qlora_dist.code_tree import path_env
from qlora_dist.ends import RankEnd
from qlora_dist.environment import for_sbatch
from qlora_dist.errors import PlanError, RunDirError, UserError
from qlora_dist.files import write_json
from qlora_dist.layout import RunDir
from qlora_dist.plan import Plan
from qlora_dist.scheduler import comment_of, live_jobs
from qlora_dist.torchrun import PASS_ENV
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

    def check(self, run: RunDir) -> None:
        """Refuse what cannot be submitted now.

        Raises:
            RunDirError: A job of this run is in the queue already.
            UserError: There is no Slurm here.
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

    def submit(self, run: RunDir, plan: Plan, *, say: Callable[[str], None]) -> RankEnd | None:
        """Send the run, which :meth:`check` has let pass, to the queue.

        Raises:
            UserError: Slurm refuses the job.
        """
        # Whoever submits a cancelled run wants it again, requeues and all.
        run.cancel_file.unlink(missing_ok=True)
        folder = run.control / "submitit"
        folder.mkdir(mode=0o700, exist_ok=True)
        executor = SlurmExecutor(folder)
        executor.update_parameters(**parameters(plan, run.root))
        env = for_sbatch(os.environ, _pass_env(plan))
        write_json(run.submitted_json, {"left_out": sorted(set(os.environ) - set(env))})
        if unused := sorted(name for name in os.environ if name.startswith("SBATCH_")):
            say(f"not used: {', '.join(unused)}; a profile says what sbatch is told")
        try:
            # Not submit(): the job is ours, and nothing of it is pickled.
            with _environment(env):
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
    minutes = _minutes(spec.resources.time)
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
        "setup": _setup(profile, run_dir),
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


def _setup(profile: Profile, run_dir: Path) -> list[str]:
    env = dict(profile.env)
    if env:
        # What a profile sets, a process gets.
        env[PASS_ENV] = " ".join(profile.env)
    if profile.network_interface is not None:
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            env.setdefault(name, profile.network_interface)
    return [
        # Until the batch process handles them; what is ignored now cannot end it before.
        "trap '' TERM USR1 USR2",
        *(f"export {name}={shlex.quote(value)}" for name, value in env.items()),
        *profile.setup,
        *_code_lines(run_dir),
    ]


def _code_lines(run_dir: Path) -> list[str]:
    """The run's own code, before what the lines above have put on Python's path."""
    code = path_env(run_dir)
    return [
        f'export PYTHONPATH={shlex.quote(code.pop("PYTHONPATH"))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        *(f"export {name}={value}" for name, value in code.items()),
    ]


def _pass_env(plan: Plan) -> list[str]:
    profile = load_profile(plan.spec.resources.profile)
    return [*plan.spec.resources.pass_env, *profile.env]


@contextlib.contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    """Run a ``with`` block in another environment: submitit gives sbatch that of the process."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _cpus(plan: Plan) -> int | None:
    each = plan.spec.resources.cpus_per_process
    return None if each is None else each * plan.topology.processes_per_node


def _minutes(text: str | None) -> int:
    if text is None:
        return _DEFAULT_TIME_MIN
    days, _, clock = text.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    total = (int(days or 0) * 24 + hours) * 60 + minutes + (1 if seconds else 0)
    return max(1, total)


def _last_words(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if "sbatch: error:" in line]
    return "; ".join(line.partition("sbatch: error: ")[2] for line in lines) or str(error)
