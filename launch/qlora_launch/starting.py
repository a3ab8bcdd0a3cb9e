"""What run, submit, resume and drill have in common: from a spec to a started run.

Everything that can be refused is refused before anything is written.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from qlora_dist import ends
from qlora_dist.checkpoints import newest_step
from qlora_dist.ends import RankEnd
from qlora_dist.errors import PlanError
from qlora_dist.layout import RunDir, newest_attempt, run_dir_of
from qlora_dist.ledger import failure_lines
from qlora_dist.plan import Plan, make_plan
from qlora_dist.resume import check_change
from qlora_dist.spec import RunSpec
from qlora_dist.spec_file import spec_from_tree
from qlora_launch.backends import Backend
from qlora_launch.code_snapshot import take_code
from qlora_launch.hub_cache import check_prefetched
from qlora_launch.pins import pin, pin_changed
from qlora_launch.render import is_offline, render
from qlora_launch.room import shortages
from qlora_launch.rundir import (
    absolute_paths,
    change_run_dir,
    check_local_paths,
    write_run_dir,
)
from qlora_launch.show import bundle_text

Say = Callable[[str], None]


def plan_of(spec: RunSpec, *, ask_hub: bool) -> Plan:
    """The plan of a spec, with absolute paths and commits.

    Raises:
        PlanError: What it asks for cannot be.
    """
    return make_plan(pin(absolute_paths(spec), ask_hub=ask_hub))


def run_of(plan: Plan) -> RunDir:
    """Where a plan's run is, or will be."""
    return RunDir(run_dir_of(plan.spec))


def resumed_plan(run: RunDir, before: RunSpec, overrides: Sequence[str], *, ask_hub: bool) -> Plan:
    """The plan of a run that goes on, perhaps with changes.

    Raises:
        PlanError: A change would make it another run, or it has more steps behind it.
    """
    spec = before
    if overrides:
        tree = before.model_dump(mode="json")
        spec = absolute_paths(spec_from_tree(tree, overrides, source=str(run.run_json)))
        spec = pin_changed(before, spec, ask_hub=ask_hub)
        check_change(before, spec)
    done, steps = newest_step(run.checkpoints), spec.schedule.steps
    if steps is not None and steps < done:
        raise PlanError(
            f"schedule.steps: {steps} steps, and the run has {done} behind it; use at least {done}"
        )
    return make_plan(spec.model_copy(update={"run_dir": str(run.root)}))


def print_bundle(plan: Plan) -> int:
    """The dry run."""
    sys.stdout.write(bundle_text(render(plan)) + "\n")
    return 0


def write(
    plan: Plan, backend: Backend | None, config: str, overrides: Sequence[str], *, say: Say
) -> RunDir:
    """Write a run's directory.

    Args:
        plan: Of the run.
        backend: Where it is to start at once; None if it is not.
        config: The file that it is from, for messages.
        overrides: Of the file.
        say: Takes what a person should see.

    Raises:
        QLoRAError: It cannot be started; nothing was changed.
    """
    bundle = render(plan)
    _check(plan, RunDir(bundle.run_dir), backend, [config, *overrides])
    check_local_paths(plan.spec)
    for line in shortages(plan):
        say(f"warning: {line}")
    run = write_run_dir(bundle, plan.spec)
    if backend is not None:
        say(f"run directory: {run.root}")
        take_code(run, say=say)
    return run


def rewrite(
    run: RunDir, plan: Plan, backend: Backend, overrides: Sequence[str], *, say: Say
) -> None:
    """Give a run that goes on its changes, and the code as it is now.

    Raises:
        QLoRAError: It cannot be started; nothing was changed.
    """
    _check(plan, run, backend, [str(run.root), *overrides])
    bundle = render(plan)
    if not overrides:
        # The cluster's profile may be another by now; whatever else was edited, the ranks refuse.
        bundle = replace(bundle, files=backend.files(plan, run.root))
    if bundle.files:
        change_run_dir(run, bundle)
    say(f"run directory: {run.root}")
    take_code(run, say=say)


def start(run: RunDir, plan: Plan, backend: Backend, *, say: Say) -> int:
    """Start a run that has been written; the exit code of the command."""
    end = backend.submit(run, plan, say=say)
    if end is None:
        return ends.DONE
    if end.code == ends.DONE:
        say(f"done: {end.cause}")
    elif end.code == ends.PREEMPTED:
        say(f"{end.cause}; go on with: qlora resume {shlex.quote(str(run.root))}")
    else:
        sys.stderr.write(_failure_text(run, end))
    return end.code


def _check(plan: Plan, run: RunDir, backend: Backend | None, named: Sequence[str]) -> None:
    if plan.not_runnable:
        raise PlanError("\n".join(plan.not_runnable))
    if is_offline(plan):
        # Resources do not matter to what is fetched.
        words = [word for word in named if not word.startswith("resources.")]
        check_prefetched(plan.spec, shlex.join(words))
    if backend is not None:
        # What a job that waits will run stays as it is.
        backend.check(run)


def _failure_text(run: RunDir, end: RankEnd) -> str:
    attempt = newest_attempt(run)
    if attempt is None:
        return f"qlora: {end.cause}\n"
    return "".join(f"{line}\n" for line in failure_lines(run, attempt, end))
