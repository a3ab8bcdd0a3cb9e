"""Writing files so that a reader sees the old one or the new one, never half of either."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# What one node has made, others see after their caches have run out (NFS: 60 s at most).
SEEN_WITHIN_S = 90.0
_CHUNK_BYTES = 16 << 20


def fsync_dir(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step, durably, with mode 0600.

    Raises:
        OSError: It could not be written; ``path`` is as it was, and nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace ``path`` by ``value`` as JSON; see :func:`write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_file(path: Path, *, on_chunk: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of a file's bytes, in hex.

    Args:
        path: The file.
        on_chunk: Called between pieces of it; what it raises ends the reading.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            on_chunk()
    return digest.hexdigest()


def refuse_foreign(path: Path) -> None:
    """Refuse a folder in which anything belongs to another user, or is a link.

    Raises:
        PermissionError: Something does.
    """
    for entry in (path, *path.rglob("*")):
        if entry.is_symlink():
            raise PermissionError(f"{entry}: is a link, and there should be none")
        if entry.stat().st_uid != os.geteuid():
            raise PermissionError(f"{entry}: belongs to another user")


def replace_dir(new: Path, final: Path) -> None:
    """Put the finished folder ``new`` in the place of ``final``.

    Renames are atomic and a folder cannot be renamed onto a full one, so the old one steps aside
    first; a crash between the two leaves it beside, under ``.old``.
    """
    old = final.with_name(final.name + ".old")
    remove_tree(old)
    for file in new.rglob("*"):
        if file.is_file():
            fsync_file(file)
    fsync_dir(new)
    if final.exists():
        final.rename(old)
    new.rename(final)
    fsync_dir(final.parent)
    remove_tree(old)


def wait_for(path: Path, timeout_s: float) -> None:
    """Wait until a path that another machine has made is seen here.

    Raises:
        FileNotFoundError: It is not, after that long.
    """
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise FileNotFoundError(f"{path} is not seen on {platform.node()}")
        time.sleep(0.5)


def remove_tree(path: Path) -> None:
    """Remove a folder and all in it, if it is there."""
    # Not imported at the top: shutil alone costs a tenth of `qlora --help`.
    import shutil

    if path.exists():
        shutil.rmtree(path)
