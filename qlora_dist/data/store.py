"""The tokenised corpus on disk: flat arrays, memory-mapped, under one manifest.

::

    NAME/                   NAME is a fingerprint of everything that decides the content
      tokens.bin            int32  (tokens,)        ids of all samples, one after the other
      learned.bin           bool   (tokens,)        which of them are targets of the loss
      offsets.bin           int64  (samples + 1,)   where each sample begins
      cuts.bin              int32  (samples, 2)     tokens that prompt and answer lost to limits
      targets.bin           int32  (samples,)       target tokens of each sample
      train.bin             int64  (n,)             samples to train on; a weight repeats them
      validation.bin        int64  (m,)             samples held out
      pack_offsets.bin      int64  (sequences + 1,) which of ``train`` share a sequence; absent
      pack_members.bin      int64  (n,)             where nothing is packed
      corpus.json           sizes and hashes of these, and counts

A store is written under another name and renamed when it is whole, so that a reader, and a second
writer, see all of it or nothing.
"""

import contextlib
import hashlib
import json
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_dist import unfinished
from qlora_dist.data.tokens import Sample
from qlora_dist.files import (
    fsync_file,
    refuse_foreign,
    remove_tree,
    sha256_file,
    write_json,
)

FORMAT = 1
MANIFEST = "corpus.json"
_DTYPES = {
    "tokens": "<i4",
    "learned": "|b1",
    "offsets": "<i8",
    "cuts": "<i4",
    "targets": "<i4",
    "train": "<i8",
    "validation": "<i8",
    "pack_offsets": "<i8",
    "pack_members": "<i8",
}


class DamagedStoreError(Exception):
    """A store is not what its manifest says; the message says how."""


@dataclass(frozen=True)
class Store:
    """An open store.

    Attributes:
        path: Its folder.
        arrays: Name -> array, memory-mapped, read-only.
        facts: What its builder had to say: counts, ids, ...
        sha256: Fingerprint of arrays and facts.
    """

    path: Path
    arrays: Mapping[str, npt.NDArray[Any]]
    facts: Mapping[str, Any]
    sha256: str


def open_store(path: Path, *, verify: bool, on_chunk: Callable[[], None] = lambda: None) -> Store:
    """Open a store.

    Args:
        path: Its folder.
        verify: Read every byte and compare hashes; else only sizes are compared.
        on_chunk: Called between pieces of files that are read; what it raises ends the reading.

    Raises:
        FileNotFoundError: There is none.
        DamagedStoreError: It is damaged.
        OSError: It cannot be read, or belongs to another user.
    """
    try:
        tree = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        manifest = tree["manifest"]
        if _manifest_sha256(manifest) != tree["sha256"]:
            raise DamagedStoreError(f"{path / MANIFEST}: was changed after it was written")
        files = {name: dict(entry) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        if path.is_dir():
            raise DamagedStoreError(f"{path} lacks its {MANIFEST}") from None
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedStoreError(f"{path / MANIFEST} cannot be read: {error}") from error
    refuse_foreign(path)
    arrays = {}
    for name, entry in files.items():
        file = path / f"{name}.bin"
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise DamagedStoreError(f"{file} is missing, truncated or grown")
        if verify and sha256_file(file, on_chunk=on_chunk) != entry["sha256"]:
            raise DamagedStoreError(f"{file}: its bytes changed after it was written")
        arrays[name] = _map(file, name, entry["bytes"])
    return Store(path, arrays, manifest["facts"], tree["sha256"])


def _manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """Hash of everything that a store holds, through the hashes of its files."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _map(file: Path, name: str, size: int) -> npt.NDArray[Any]:
    dtype = np.dtype(_DTYPES[name])
    # An empty file cannot be mapped.
    array = np.memmap(file, dtype, mode="r") if size else np.empty(0, dtype)
    return array.reshape(-1, 2) if name == "cuts" else array


class StoreWriter:
    """Writes a store, sample by sample, so that a corpus may be larger than memory.

    Use as a context manager: what was not finished is removed.

    Args:
        path: The store's final folder.

    Raises:
        OSError: The storage refused.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = unfinished.begin(path)
        self._tokens = (self._partial / "tokens.bin").open("wb")
        self._learned = (self._partial / "learned.bin").open("wb")
        # What is kept of a sample in memory: 16 bytes, whatever its length.
        self._lengths, self._cuts, self._targets = array("i"), array("i"), array("i")

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        for file in (self._tokens, self._learned):
            # A full disk refuses the last bytes once more.
            with contextlib.suppress(OSError):
                file.close()
        remove_tree(self._partial)

    def add(self, sample: Sample) -> None:
        """Append a sample."""
        self._tokens.write(sample.ids.astype("<i4", copy=False).tobytes())
        self._learned.write(sample.learned.tobytes())
        self._lengths.append(len(sample.ids))
        self._cuts.extend((sample.source_cut, sample.target_cut))
        self._targets.append(sample.num_targets)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sample so far, int64 of shape ``(samples,)``."""
        return np.array(self._lengths, np.int64)

    def finish(self, arrays: Mapping[str, npt.NDArray[np.int64]], facts: Mapping[str, Any]) -> None:
        """Write the rest and give the store its name; if another writer was quicker, take its."""
        self._tokens.close()
        self._learned.close()
        own: dict[str, npt.NDArray[Any]] = {
            "offsets": np.concatenate([[0], np.cumsum(self.lengths)]),
            "cuts": np.array(self._cuts, np.int32).reshape(-1, 2),
            "targets": np.array(self._targets, np.int32),
            **arrays,
        }
        for name, values in own.items():
            values.astype(_DTYPES[name]).tofile(self._partial / f"{name}.bin")
        files = {}
        for name in ("tokens", "learned", *own):
            file = self._partial / f"{name}.bin"
            fsync_file(file)
            files[name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        manifest = {"format": FORMAT, "facts": dict(facts), "files": files}
        write_json(
            self._partial / MANIFEST, {"manifest": manifest, "sha256": _manifest_sha256(manifest)}
        )
        unfinished.publish(self._partial, self._path)
