"""Runs as Slurm jobs: handing a batch script to sbatch through submitit, once."""

import contextlib
import io
import json
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import SlurmExecutor

from qlora_dist.ends import RankEnd
from qlora_dist.environment import for_sbatch
from qlora_dist.errors import UserError
from qlora_dist.files import write_json, write_text
from qlora_dist.layout import CONTAINER, SWEEP, RunDir, open_run, sweep_runs
from qlora_dist.ledger import standing
from qlora_dist.plan import Plan
from qlora_dist.scheduler import SchedulerError, live_jobs, refuse_queued
from qlora_slurm.ask import read_site
from qlora_slurm.case import Case
from qlora_slurm.container import container_json
from qlora_slurm.script import Job, batch_script, command, parameters, pass_env
from qlora_slurm.site_profile import load_profile
from qlora_slurm.submission import submission


class SlurmBackend:
    """Jobs of one task a node.

    Args:
        after: Jobs, or run directories whose jobs are in the queue, that must end well first.
    """

    def __init__(self, after: Sequence[str] = ()) -> None:
        self._after = tuple(after)

    def files(self, plan: Plan, run_dir: Path) -> dict[str, str]:
        """The batch script, and what a node's task is started in, for the bundle.

        Raises:
            UserError: The profile is missing or wrong.
        """
        job = Job(plan, run_dir, (run_dir,))
        files = {"batch.sh": batch_script(job)}
        container = container_json(plan, job.profile, run_dir)
        if container is not None:
            files[CONTAINER] = json.dumps(container, indent=2) + "\n"
        return files

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
        refuse_queued(run)

    def submit(self, run: RunDir, plan: Plan, *, say: Callable[[str], None]) -> RankEnd | None:
        """Send the run, which :meth:`check` has let pass, to the queue.

        Raises:
            UserError: Slurm refuses the job.
        """
        after = self._jobs_before()
        self.warn(plan, say=say)
        job = self._send(Job(plan, run.root, (run.root,), after=after), say)
        say(
            f"submitted job {job}: {plan.topology.nodes} node(s); follow it with: "
            f"qlora logs -f {shlex.quote(str(run.root))}"
        )
        return None

    def submit_sweep(
        self, runs: Sequence[RunDir], plan: Plan, parallel: int, *, say: Callable[[str], None]
    ) -> None:
        """Send several runs of one folder, which :meth:`check` has let pass, as an array.

        Args:
            runs: The runs, element by element.
            plan: Of any of them; what a job needs is the same for all.
            parallel: How many elements run at once.
            say: Takes what a person should see.

        Raises:
            UserError: Slurm refuses the job.
        """
        job = self._sweep(runs, plan, parallel)
        folder = job.folder
        self.warn(plan, say=say)
        for element, run in enumerate(runs):
            write_json(run.element_json, {"sweep": job.sweep, "element": element})
        names = dict.fromkeys([*sweep_runs(folder), *(root.name for root in job.runs)])
        write_json(folder / SWEEP, {"runs": list(names)})
        write_text(folder / "batch.sh", batch_script(job))
        (folder / "control").mkdir(mode=0o700, exist_ok=True)
        say(
            f"submitted job {self._send(job, say)}: {len(runs)} runs, {parallel} at once; see them "
            f"with: qlora list {shlex.quote(str(folder))}"
        )

    def sweep_script(self, runs: Sequence[RunDir], plan: Plan, parallel: int) -> str:
        """The script that :meth:`submit_sweep` would send; nothing is written."""
        return batch_script(self._sweep(runs, plan, parallel))

    def warn(self, plan: Plan, *, say: Callable[[str], None]) -> None:
        """Warn of a job that would wait for ever if sbatch takes it; not where Slurm is silent.

        Raises:
            UserError: There is no such partition.
        """
        profile = load_profile(plan.spec.resources.profile)
        with contextlib.suppress(SchedulerError):
            for finding in submission(Case(read_site(profile.partition), plan, profile)):
                if finding.never_starts:
                    change = f" Change it: {'; '.join(finding.change)}." if finding.change else ""
                    say(f"warning: {finding.what}{change}")

    def _sweep(self, runs: Sequence[RunDir], plan: Plan, parallel: int) -> Job:
        roots = tuple(run.root for run in runs)
        sweep = secrets.token_hex(4)
        return Job(plan, roots[0].parent, roots, parallel, self._jobs_before(), sweep)

    def _jobs_before(self) -> tuple[str, ...]:
        found: list[str] = []
        for text in self._after:
            if re.fullmatch(r"\d+(_\d+)?", text):
                found.append(text)
                continue
            root = Path(text).expanduser().absolute()
            jobs = live_jobs(root)
            if not jobs and (not root.is_dir() or standing(*open_run(root)).state != "done"):
                raise UserError(
                    f"--after {text}: neither a job's number, nor a run that waits, runs or is done"
                )
            found += jobs
        return tuple(found)

    def _send(self, job: Job, say: Callable[[str], None]) -> str:
        env = for_sbatch(os.environ, pass_env(job))
        left_out = sorted(set(os.environ) - set(env))
        for root in job.runs:
            # Whoever submits a cancelled run wants it again, requeues and all.
            RunDir(root).cancel_file.unlink(missing_ok=True)
            write_json(RunDir(root).submitted_json, {"left_out": left_out})
        folder = job.folder / "control" / "submitit"
        folder.mkdir(mode=0o700, exist_ok=True)
        executor = SlurmExecutor(folder)
        executor.update_parameters(**parameters(job))
        if unused := sorted(name for name in os.environ if name.startswith("SBATCH_")):
            say(f"not used: {', '.join(unused)}; a profile says what sbatch is told")
        try:
            # Not submit(): the job is ours, and nothing of it is pickled. What sbatch says is in
            # the error, and submitit prints it once more.
            with _environment(env), contextlib.redirect_stderr(io.StringIO()):
                return str(executor._submit_command(command(job)).job_id)
        except FailedJobError as error:
            # sbatch may give up waiting for an answer to a job that was taken.
            if jobs := live_jobs(job.runs[0]):
                say(f"sbatch failed, and the job is in the queue: {_last_words(error)}")
                return jobs[0]
            raise UserError(f"sbatch refused the job: {_last_words(error)}") from error


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


def _last_words(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if "sbatch: error:" in line]
    return "; ".join(line.partition("sbatch: error: ")[2] for line in lines) or str(error)
