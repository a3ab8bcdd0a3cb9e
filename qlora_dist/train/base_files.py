"""A base model's safetensors files: where each tensor lies, and reading pieces of them fast.

Pieces are read by threads into a few buffers that are used again and again, in the order in which
they are asked for, so that a file system's whole width is used, the GPU works meanwhile, and host
memory stays the same however large the model is.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as StalledError
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from qlora_dist.errors import ModelError, QLoRAError
from qlora_dist.train.tensor_file import DTYPES

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# 256 MiB in all. A piece is long enough for a disk, and short enough for several at a time.
PIECE_BYTES, _NUM_BUFFERS = 32 << 20, 8
# Storage that gives nothing for so long is taken for dead; another node may do better.
_STALL_S = 45.0
# No header is larger: https://github.com/huggingface/safetensors#format.
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        path: The file.
        start: First byte in it.
        dtype: Of its elements.
        shape: Its shape.
    """

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, the first dimension's unit."""
        count = self.dtype.itemsize
        for size in self.shape[1:]:
            count *= size
        return count

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.row_bytes * (self.shape[0] if self.shape else 1)


@dataclass(frozen=True)
class Piece:
    """Bytes to be read.

    Attributes:
        path: The file.
        start: First byte.
        size: How many; at most :data:`PIECE_BYTES`.
        use: Takes them, as a uint8 tensor on the CPU that is valid until the device has done
            what ``use`` asked of it.
    """

    path: Path
    start: int
    size: int
    use: Callable[[torch.Tensor], None]


def find_files(folder: Path) -> Mapping[str, Stored]:
    """Tensors of a model in a folder, by name.

    Raises:
        ModelError: There are no safetensors files, one is missing, or one is damaged.
    """
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise ModelError(
                f"model.source: {folder} holds neither {SINGLE} nor {INDEX}; other formats are not "
                "read: convert the model with its save_pretrained"
            )
        return read_header(folder / SINGLE)
    try:
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model.source: {index} cannot be read: {error}") from error
    headers = {file: read_header(folder / file) for file in sorted(set(names.values()))}
    if lost := [name for name, file in names.items() if name not in headers[file]]:
        raise ModelError(
            f"model.source: {index} names tensors that are not in their files: " + listed(lost)
        )
    return {name: headers[file][name] for name, file in names.items()}


def read_header(path: Path) -> Mapping[str, Stored]:
    """Tensors of one safetensors file.

    Raises:
        ModelError: It is missing, shorter than it should be, or no such file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_LARGEST_HEADER, size - 8):
                raise ValueError("no safetensors header")
            tree: dict[str, Any] = json.loads(file.read(length))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.source: {path} cannot be read: {error}") from error
    found, end = {}, 0
    for name, entry in tree.items():
        if name == "__metadata__":
            continue
        try:
            start, stop = entry["data_offsets"]
            stored = Stored(path, 8 + length + start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        except (KeyError, ValueError, TypeError) as error:
            raise ModelError(f"model.source: {path}: {name} cannot be read: {error}") from error
        if stored.num_bytes != stop - start:
            raise ModelError(f"model.source: {path}: {name} has {stop - start} bytes")
        found[name], end = stored, max(end, stop)
    if 8 + length + end > size:
        raise ModelError(
            f"model.source: {path} is cut short: {size:,} bytes of {8 + length + end:,}; fetch it "
            "again"
        )
    return found


def pieces_of(
    stored: Stored, first: int, count: int, unit: int, use: Callable[..., None]
) -> Iterator[Piece]:
    """Rows of a tensor as pieces.

    Args:
        stored: The tensor.
        first: First row.
        count: Rows.
        unit: Bytes of a row; those of ``stored`` may be another view of the same bytes.
        use: Takes the bytes of some rows, ``row``, the first of them, counted from ``first``, and
            ``count``, how many.
    """
    step = max(1, PIECE_BYTES // unit)
    for row in range(0, count, step):
        rows = min(step, count - row)
        start = stored.start + (first + row) * unit
        yield Piece(stored.path, start, rows * unit, partial(use, row=row, count=rows))


@dataclass(frozen=True)
class _Job:
    """A piece that is read into one of the buffers."""

    piece: Piece
    place: int
    done: "Future[torch.Tensor]" = field(default_factory=Future)


class PieceReader:
    """Reads pieces ahead of their use.

    Args:
        device: Where what is read goes; page-locked buffers for a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._buffers = [
            torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=self._cuda)
            for _ in range(_NUM_BUFFERS)
        ]
        # When the device has read what lay in each.
        self._free: list[Any] = [None] * _NUM_BUFFERS
        self._files: dict[Path, int] = {}

    def read(self, pieces: Iterable[Piece]) -> None:
        """Read all pieces and use each, in their order.

        Raises:
            ModelError: A file ends before its bytes.
            QLoRAError: Storage does not answer.
        """
        jobs: SimpleQueue[_Job | None] = SimpleQueue()
        for _ in range(_NUM_BUFFERS):
            # A pool's threads would be waited for when the process ends: one whose read hangs too.
            Thread(target=self._serve, args=(jobs,), daemon=True).start()
        waiting: deque[_Job] = deque()
        try:
            for number, piece in enumerate(pieces):
                if len(waiting) == _NUM_BUFFERS:
                    self._use(waiting.popleft())
                waiting.append(_Job(piece, number % _NUM_BUFFERS))
                jobs.put(waiting[-1])
            while waiting:
                self._use(waiting.popleft())
        finally:
            for _ in range(_NUM_BUFFERS):
                jobs.put(None)

    def close(self) -> None:
        """Close the files."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def _serve(self, jobs: "SimpleQueue[_Job | None]") -> None:
        while (job := jobs.get()) is not None:
            try:
                job.done.set_result(self._read(job.piece, job.place))
            except BaseException as error:
                job.done.set_exception(error)

    def _use(self, job: _Job) -> None:
        piece = job.piece
        try:
            piece.use(job.done.result(timeout=_STALL_S))
        except StalledError:
            raise QLoRAError(
                f"{piece.path}: storage has given nothing for {_STALL_S:.0f} s"
            ) from None
        except OSError as error:
            raise QLoRAError(f"{piece.path} cannot be read: {error}") from error
        if self._cuda:
            self._free[job.place] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._free[job.place].record()

    def _read(self, piece: Piece, place: int) -> torch.Tensor:
        if self._free[place] is not None:
            self._free[place].synchronize()
        target = self._buffers[place][: piece.size]
        if not piece.size:
            return target
        view, done = target.numpy().data, 0
        fd = self._open(piece.path)
        while done < piece.size:
            count = os.preadv(fd, [view[done:]], piece.start + done)
            if count == 0:
                raise ModelError(
                    f"model.source: {piece.path} ends before its bytes; fetch it again"
                )
            done += count
        return target

    def _open(self, path: Path) -> int:
        fd = self._files.get(path)
        if fd is None:
            # Two threads may both open it; what is not kept is closed with the process.
            fd = self._files.setdefault(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        return fd


def listed(names: Iterable[str], most: int = 4) -> str:
    """The first of some names, and how many there are."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")
