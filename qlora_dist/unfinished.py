"""Folders that are written under another name, and renamed when they are whole.

A reader, and a second writer, see all of such a folder or nothing. What a killed writer left is
removed by the next one, unless it may still be at work, here or on another machine.
"""

import contextlib
import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from qlora_dist.files import fsync_dir, remove_tree, write_json
from qlora_dist.process import Process, start_ticks

OWNER = "owner.json"


def begin(path: Path) -> Path:
    """Make the empty folder in which ``path`` is to be written.

    Raises:
        OSError: The storage refused.
    """
    me = Process.this()
    partial = path.with_name(f"{path.name}.partial-{me.host}-{me.pid}")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_abandoned(path)
    remove_tree(partial)
    partial.mkdir(mode=0o700)
    write_json(partial / OWNER, asdict(me))
    return partial


def publish(partial: Path, path: Path) -> None:
    """Give a folder that is whole its name; if another writer was quicker, its stands.

    Raises:
        OSError: The storage refused.
    """
    (partial / OWNER).unlink()
    try:
        partial.rename(path)
        fsync_dir(path.parent)
    except OSError as error:
        # Another writer was quicker, and what it wrote is the same.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """:func:`begin` and :func:`publish` around a ``with`` block; a failure leaves nothing."""
    partial = begin(path)
    try:
        yield partial
        publish(partial, path)
    finally:
        with contextlib.suppress(OSError):
            remove_tree(partial)


def _remove_abandoned(path: Path) -> None:
    me = Process.this()
    for partial in path.parent.glob(f"{path.name}.partial-*"):
        host, _, pid = partial.name.rpartition(".partial-")[2].rpartition("-")
        try:
            owner = Process(**json.loads((partial / OWNER).read_text(encoding="utf-8")))
            gone = owner.is_gone()
        except (OSError, ValueError, TypeError):
            # Killed before it had said who it is, or after it was done.
            gone = host == me.host and start_ticks(int(pid)) is None if pid.isdigit() else None
        if gone:
            remove_tree(partial)
