"""RUN/code, the code that a run's processes execute, and whether it is what was put there.

``RUN/code.json`` has the hash of each file. The launcher writes both
(``qlora_launch.code_snapshot``); a process that it has started ends if it finds something else.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import qlora_dist
from qlora_dist.errors import PlanError, QLoRAError, RunDirError
from qlora_dist.files import sha256_file
from qlora_dist.layout import RunDir

PACKAGE = "qlora_dist"
_SHOWN = 5


def package_dir() -> Path:
    """Folder of the package that this process has imported."""
    assert qlora_dist.__file__ is not None
    return Path(qlora_dist.__file__).parent


def path_env(root: Path, before: str | None = None) -> dict[str, str]:
    """Variables with which a Python process finds a run's code before any other.

    PYTHONSAFEPATH keeps the current folder, which may be a checkout, off the path of ``python -m``.

    Args:
        root: The run directory.
        before: PYTHONPATH as it was; its entries follow.

    Raises:
        PlanError: The folder cannot be on a PYTHONPATH.
    """
    if os.pathsep in str(root):
        better = str(root).replace(os.pathsep, "-")
        raise PlanError(
            f"run_dir: {str(root)!r} holds a {os.pathsep!r}, which parts the folders of "
            f"PYTHONPATH; use for example {better!r}"
        )
    code = str(RunDir(root).code)
    kept = [entry for entry in (before or "").split(os.pathsep) if entry not in ("", code)]
    return {"PYTHONPATH": os.pathsep.join([code, *kept]), "PYTHONSAFEPATH": "1"}


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path in it.

    What Python compiles by itself (``__pycache__``) does not count. A link is not followed, and
    stands for itself with no hash.
    """
    hashes = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if "__pycache__" in name.parts:
            continue
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            hashes[str(name)] = "no plain file"
        elif path.is_file():
            hashes[str(name)] = sha256_file(path)
    return hashes


def tree_sha256(hashes: Mapping[str, str]) -> str:
    """One fingerprint over names and hashes."""
    lines = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def recorded(run: RunDir) -> dict[str, Any] | None:
    """What code.json says; None where there is none that can be read."""
    try:
        tree = json.loads(run.code_json.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return tree if isinstance(tree, dict) and isinstance(tree.get("files"), dict) else None


def check_code(run: RunDir) -> None:
    """Whether this process runs the run's own code, unchanged.

    Raises:
        RunDirError: It does not.
        QLoRAError: The code cannot be read now.
    """
    resume = f"qlora resume {shlex.quote(str(run.root))}"
    try:
        tree, found = recorded(run), file_hashes(run.code)
    except OSError as error:
        raise QLoRAError(f"{run.code} cannot be read: {error}") from error
    if tree is None:
        raise RunDirError(f"{run.code_json} cannot be read; to take the code anew: {resume}")
    if not _is_snapshot(run):
        raise RunDirError(
            f"this process has its code from {package_dir()}, and the run's is in {run.code}; "
            f"start it with: {resume}"
        )
    # The fingerprint too: whoever edits a file may edit its hash.
    if found != tree["files"] or tree_sha256(found) != tree.get("sha256"):
        raise RunDirError(
            f"{run.code} is not what {run.code_json.name} says it is: "
            f"{_differences(tree['files'], found)}. To take the code anew: "
            f"rm -r {shlex.quote(str(run.code))}; {resume}"
        )


def running_sha256() -> str:
    """Fingerprint of the Python files that this process has its code from."""
    return tree_sha256(_running())


def other_code(run: RunDir) -> str | None:
    """For a process that the user has started: a line if its code is not the run's."""
    tree = recorded(run)
    mine = _running()
    if tree is None or mine == _python(tree["files"]):
        return None
    return (
        f"code: this process has it from {package_dir()}, which is not the run's: "
        f"{_differences(_python(tree['files']), mine)}"
    )


def _is_snapshot(run: RunDir) -> bool:
    try:
        return package_dir().samefile(run.code / PACKAGE)
    except OSError:
        return False


def _running() -> dict[str, str]:
    found = file_hashes(package_dir())
    return _python({f"{PACKAGE}/{name}": found[name] for name in found})


def _python(hashes: Mapping[str, str]) -> dict[str, str]:
    return {name: found for name, found in hashes.items() if name.endswith(".py")}


def _differences(wanted: Mapping[str, str], found: Mapping[str, str]) -> str:
    names = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    lines = [
        f"{name} is {'missing' if name not in found else 'new' if name not in wanted else 'edited'}"
        for name in names[:_SHOWN]
    ]
    more = len(names) - _SHOWN
    return ", ".join([*lines, *([f"and {more} more"] if more > 0 else [])]) or "its sha256"
