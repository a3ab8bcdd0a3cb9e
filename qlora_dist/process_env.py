"""What the processes of an attempt get of the environment, and a note of it."""

import contextlib
import json
from collections.abc import Collection, Mapping

from qlora_dist.code_tree import path_env
from qlora_dist.environment import allowed, redacted
from qlora_dist.files import write_json
from qlora_dist.layout import RunDir

# Names beyond the allow-list, parted by spaces, that a job's script adds to command.json's.
PASS_ENV = "QLORA_PASS_ENV"


def pass_env(run: RunDir, env: Mapping[str, str]) -> list[str]:
    """Names and patterns beyond the allow-list: the spec's, and those that a job's script adds."""
    command = json.loads(run.command_json.read_text(encoding="utf-8"))
    return [*command.get("pass_env", []), *env.get(PASS_ENV, "").split()]


def process_env(run: RunDir, attempt: int, env: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of an attempt's training processes.

    Args:
        run: The run directory; its code comes first on Python's path.
        attempt: Number of the attempt.
        env: Environment of the launcher, of which they get what is allowed.

    Raises:
        PlanError: The run directory's name cannot be on Python's path.
    """
    command = json.loads(run.command_json.read_text(encoding="utf-8"))
    return {
        **allowed(env, pass_env(run, env)),
        **command["env"],
        **path_env(run.root, env.get("PYTHONPATH")),
        "QLORA_ATTEMPT": str(attempt),
    }


def note_env(
    run: RunDir,
    attempt: int,
    env: Mapping[str, str],
    got: Mapping[str, str],
    *,
    left_out: Collection[str] = (),
) -> None:
    """Write down what an attempt's processes got, and the names of what they did not get.

    A note: a disk that refuses it keeps no run from starting.

    Args:
        run: The run directory.
        attempt: Number of the attempt.
        env: Environment of the launcher.
        got: That of the processes.
        left_out: Names that the launcher did not get either.
    """
    names = sorted({*left_out, *env} - {*got})
    with contextlib.suppress(OSError):
        write_json(run.environment_json(attempt), {"variables": redacted(got), "left_out": names})
