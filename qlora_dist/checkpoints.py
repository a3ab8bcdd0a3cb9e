"""The commit protocol of checkpoints: names, manifest, validity, retention. No tensors.

A checkpoint is written as ``step_000100.partial``; once every rank has confirmed its files, rank 0
writes ``manifest.json`` with their sizes and hashes, and renames the folder. Readers trust only a
final name whose files are the manifest's.
"""

import contextlib
import errno
import json
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_dist import faults
from qlora_dist.errors import CheckpointError
from qlora_dist.files import (
    fsync_dir,
    fsync_file,
    refuse_foreign,
    remove_tree,
    sha256_file,
    write_json,
)

# Inside a checkpoint, for files of every rank.
FOLDERS = ("weights", "optimizer", "rng")
MANIFEST = "manifest.json"
FORMAT = 2
_NAME = re.compile(r"^step_(\d{6,})$")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose files have been checked."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps that were complete."""
        return int(self.manifest["step"])


def final_path(checkpoints: Path, step: int) -> Path:
    """Name of a committed checkpoint."""
    return checkpoints / f"step_{step:06d}"


def partial_path(checkpoints: Path, step: int) -> Path:
    """Name of a checkpoint that is being written."""
    return checkpoints / f"step_{step:06d}.partial"


def begin(checkpoints: Path, step: int) -> Path:
    """Make the empty folder that all ranks write into."""
    checkpoints.mkdir(mode=0o700, exist_ok=True)
    partial = partial_path(checkpoints, step)
    remove_tree(partial)
    for name in FOLDERS:
        (partial / name).mkdir(mode=0o700, parents=True)
    return partial


@dataclass(frozen=True)
class Written:
    """A file of a checkpoint, as its writer knows it."""

    bytes: int
    sha256: str


def describe(partial: Path) -> dict[str, Written]:
    """Files of a folder by name, read back from the disk and made durable."""
    files = {}
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            fsync_file(path)
            name = path.relative_to(partial).as_posix()
            files[name] = Written(path.stat().st_size, sha256_file(path))
    return files


def commit(
    partial: Path, *, step: int, facts: Mapping[str, Any], files: Mapping[str, Written]
) -> Path:
    """Write the manifest and give the folder its final name.

    Args:
        partial: Folder that every rank has finished writing into.
        step: Steps that are complete.
        facts: What else the manifest says: spec_sha256, world_size, versions, ...
        files: What the ranks have written, by name in the folder, and made durable. Not a listing:
            a shared file system may show this node another node's files late.

    Raises:
        OSError: The storage refused; the folder is still a partial one.
    """
    for name in FOLDERS:
        fsync_dir(partial / name)
    faults.reach("save-manifest")
    write_json(
        partial / MANIFEST,
        {
            "format": FORMAT,
            "step": step,
            "committed_at": time.time(),
            **facts,
            "files": {name: asdict(file) for name, file in sorted(files.items())},
        },
    )
    final = final_path(partial.parent, step)
    faults.reach("save-rename")
    # A step saved twice: the old one steps aside until the new one has its name.
    old = final.with_name(final.name + ".old")
    if final.exists():
        remove_tree(old)
        final.rename(old)
    partial.rename(final)
    fsync_dir(final.parent)
    discard(old)
    return final


def open_checkpoint(path: Path) -> Checkpoint:
    """Check a committed checkpoint, every byte of it.

    Raises:
        CheckpointError: It is not what its manifest says, or not ours; the message says how.
    """
    try:
        refuse_foreign(path)
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{path}: format {manifest['format']}; this version reads {FORMAT}"
            )
        files = dict(manifest["files"])
        found = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {
            MANIFEST
        }
        if missing := sorted(set(files) - found):
            raise CheckpointError(f"{path}: lacks {', '.join(missing)}")
        if extra := sorted(found - set(files)):
            raise CheckpointError(f"{path}: holds files of nobody's: {', '.join(extra)}")
        _check_files(path, files)
        if final_path(path.parent, int(manifest["step"])) != path:
            raise CheckpointError(f"{path}: its manifest is of step {manifest['step']}")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: lacks {error.filename}") from None
    except PermissionError as error:
        raise CheckpointError(str(error)) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return Checkpoint(path, manifest)


def _check_files(path: Path, files: Mapping[str, Any]) -> None:
    for name, entry in files.items():
        if (path / name).stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{path / name}: is truncated or grown")
        if sha256_file(path / name) != entry["sha256"]:
            raise CheckpointError(f"{path / name}: its bytes changed after it was written")


def read_manifest(path: str | Path) -> Checkpoint:
    """A checkpoint that another process has checked."""
    path = Path(path)
    return Checkpoint(path, json.loads((path / MANIFEST).read_text(encoding="utf-8")))


def committed_paths(checkpoints: Path) -> list[Path]:
    """Folders with a final name, newest step first; not checked."""
    if not checkpoints.is_dir():
        return []
    paths = [path for path in checkpoints.iterdir() if _NAME.match(path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def newest_step(checkpoints: Path) -> int:
    """Step of the newest checkpoint, not checked; 0 before the first."""
    paths = committed_paths(checkpoints)
    return int(paths[0].name.removeprefix("step_")) if paths else 0


def newest_valid(checkpoints: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole; damaged newer ones are set aside.

    Returns:
        The checkpoint, or None where there are no checkpoints at all; and one message for each
        folder that was set aside (renamed to ``NAME.invalid``).

    Raises:
        CheckpointError: There are checkpoints and none is valid. Nothing is deleted or renamed.
    """
    _finish_replacing(checkpoints)
    _clear_partial(checkpoints)
    reasons: dict[Path, str] = {}
    for path in committed_paths(checkpoints):
        try:
            found = open_checkpoint(path)
        except CheckpointError as error:
            reasons[path] = str(error)
            continue
        return found, [_set_aside(bad, why) for bad, why in reasons.items()]
    if reasons:
        raise CheckpointError(
            "no checkpoint is valid, and a fresh start would throw the run away:\n"
            + "\n".join(f"  {why}" for why in reasons.values())
            + f"\nMend one, or move {checkpoints} away to start the run anew"
        )
    return None, []


def _finish_replacing(checkpoints: Path) -> None:
    """Give back its name to a checkpoint that a crash left between two renames of ``commit``."""
    for old in checkpoints.glob("step_*.old") if checkpoints.is_dir() else ():
        final = old.with_suffix("")
        if final.exists():
            discard(old)
        else:
            old.rename(final)


def _clear_partial(checkpoints: Path) -> None:
    """Remove saves that were never committed; whoever wrote them is gone when a run is opened."""
    for partial in checkpoints.glob("step_*.partial") if checkpoints.is_dir() else ():
        discard(partial)


def _set_aside(path: Path, why: str) -> str:
    aside = path.with_name(path.name + ".invalid")
    remove_tree(aside)
    path.rename(aside)
    return f"{why}; set aside as {aside.name}"


def retain(
    checkpoints: Path, *, keep_last: int, keep_every: int | None, best_steps: Collection[int | None]
) -> None:
    """Remove old checkpoints.

    Args:
        checkpoints: Their folder.
        keep_last: The newest so many stay.
        keep_every: Those of steps that it divides stay; None for none.
        best_steps: Those steps' stay.
    """
    for path in committed_paths(checkpoints)[keep_last:]:
        step = int(path.name.removeprefix("step_"))
        if step not in best_steps and (keep_every is None or step % keep_every):
            remove_tree(path)


def discard(partial: Path) -> None:
    """Remove what a failed save left, as far as the storage lets us."""
    with contextlib.suppress(OSError):
        remove_tree(partial)


def storage_message(error: Exception, path: Path) -> str:
    """One sentence for a failed write, by Python or by safetensors."""
    number = error.errno if isinstance(error, OSError) else None
    # safetensors is written in Rust, and its errors hold the number in their text.
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(found.group(1))
    reason = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "your disk quota is used up",
        errno.EROFS: "the file system is read-only",
    }.get(number or 0, str(error))
    return f"cannot write {path}: {reason}"
