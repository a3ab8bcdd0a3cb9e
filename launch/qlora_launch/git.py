"""What git knows of a folder."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_dist.errors import QLoRAError

# A checkout on a slow disk answers within seconds.
_TIMEOUT_S = 60.0
_DIFF = ("diff", "--relative", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames")


class GitError(QLoRAError):
    """There is no git, or it refused."""


@dataclass(frozen=True)
class Checkout:
    """A folder of a git checkout; names are relative to it, with ``/``.

    Attributes:
        folder: The folder.
        commit: What is checked out.
        tracked: Files of the index; some may be deleted.
        untracked: Files beside them that are not ignored.
        changed: Tracked files that are not as committed.
    """

    folder: Path
    commit: str
    tracked: tuple[str, ...]
    untracked: tuple[str, ...]
    changed: tuple[str, ...]

    @classmethod
    def of(cls, package: Path) -> "Checkout | None":
        """The checkout that a package is part of; None where it is installed, or git is not."""
        others = ("--others", "--exclude-standard")
        try:
            # An environment that lies inside a checkout is none of its files.
            _git(package, "ls-files", "--error-unmatch", "--", "__init__.py")
            return cls(
                package,
                _git(package, "rev-parse", "--verify", "HEAD").decode().strip(),
                _names(_git(package, "ls-files", "-z", "--cached", "--", ".")),
                _names(_git(package, "ls-files", "-z", *others, "--", ".")),
                _names(_git(package, *_DIFF, "--name-only", "-z", "HEAD", "--", ".")),
            )
        except GitError:
            return None

    @property
    def files(self) -> list[str]:
        """All that belong to it."""
        return sorted({*self.tracked, *self.untracked})

    def diff(self, names: Sequence[str]) -> str:
        """How tracked files differ from the commit; empty for no names.

        Raises:
            GitError: git refused.
        """
        if not names:
            return ""
        # A name is no pattern here.
        output = _git(self.folder, "--literal-pathspecs", *_DIFF, "HEAD", "--", *names)
        return output.decode(errors="replace")


def _git(folder: Path, *args: str) -> bytes:
    """Run git in a folder, with no program of the user's beside it.

    Raises:
        GitError: There is no git, or it refused.
    """
    # GIT_DIR and its like, as hooks have them, would name another repository.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", *args],
            cwd=folder,
            env=env | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise GitError(f"git {args[0]} in {folder}: {error}") from error
    if done.returncode:
        raise GitError(f"git {args[0]} in {folder}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def _names(output: bytes) -> tuple[str, ...]:
    return tuple(os.fsdecode(name) for name in output.split(b"\0") if name)
