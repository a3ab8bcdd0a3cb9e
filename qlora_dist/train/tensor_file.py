"""Writing safetensors files tensor by tensor, hashed as they are written.

The safetensors library wants all tensors of a file at once and keeps Python's lock while it writes.
This holds one tensor at a time, and leaves the other threads (a training loop) running. The format:
https://github.com/huggingface/safetensors#format.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}
# Bytes that are written and hashed at a time.
_CHUNK = 64 << 20


@dataclass(frozen=True)
class Kind:
    """What a tensor of a file is.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its data."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Entry(Kind):
    """One tensor of a file that is to be written.

    Attributes:
        make: Gives the tensor, on any device, when its turn comes.
    """

    make: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Entry":
        """An entry for a tensor that is there already."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @classmethod
    def in_file(cls, file: Any, name: str) -> "Entry":
        """An entry for a tensor of an open safetensors file, read when its turn comes."""
        part = file.get_slice(name)
        dtype, shape = DTYPES[part.get_dtype()], tuple(part.get_shape())
        return cls(dtype, shape, lambda: file.get_tensor(name))


def write_tensors(
    path: Path,
    entries: Mapping[str, Entry],
    *,
    metadata: Mapping[str, str] | None = None,
    on_tensor: Callable[[], None] = lambda: None,
) -> str:
    """Write a safetensors file, durably.

    The folder's own entry for it is not made durable.

    Args:
        path: The file; replaced if it is there.
        entries: Tensors by name, written in this order; each is made once.
        metadata: Text for the file's header.
        on_tensor: Called before each tensor.

    Returns:
        SHA-256 of the file's bytes, in hex.

    Raises:
        OSError: It could not be written; what is there then is not to be used.
    """
    with TensorFile(path, entries, metadata=metadata) as file:
        for name, entry in entries.items():
            on_tensor()
            file.add(name, entry.make())
    return file.sha256


class TensorFile:
    """A safetensors file that is written tensor by tensor, as they come.

    Use as a context manager; at its end the file is durable, but for its folder's own entry.

    Args:
        path: The file; replaced if it is there.
        kinds: Dtype and shape of each tensor by name, in the order in which they will come.
        metadata: Text for the file's header.

    Attributes:
        sha256: Of the file's bytes, in hex, once it is whole.

    Raises:
        OSError: It could not be written; what is there then is not to be used.
    """

    def __init__(
        self, path: Path, kinds: Mapping[str, Kind], *, metadata: Mapping[str, str] | None = None
    ) -> None:
        self._expected = iter(kinds.items())
        self._digest = hashlib.sha256()
        self._file = path.open("wb", buffering=0)
        self.sha256 = ""
        self._put(memoryview(_header(kinds, metadata)))

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                assert next(self._expected, None) is None
                os.fsync(self._file.fileno())
                self.sha256 = self._digest.hexdigest()
        finally:
            self._file.close()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor."""
        expected, entry = next(self._expected)
        tensor = tensor.detach().cpu().contiguous()
        assert (name, tensor.dtype, tuple(tensor.shape)) == (expected, entry.dtype, entry.shape)
        for chunk in _chunks(tensor):
            self._put(chunk)

    def _put(self, data: memoryview) -> None:
        self._digest.update(data)
        _write(self._file.fileno(), data)


def _header(entries: Mapping[str, Kind], metadata: Mapping[str, str] | None) -> bytes:
    tree: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, entry in entries.items():
        size = entry.num_bytes
        tree[name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(tree, separators=(",", ":")).encode()
    # Tensors begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(tensor: torch.Tensor) -> Iterable[memoryview]:
    if tensor.numel() == 0:
        return
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(data), _CHUNK):
        yield data[start : start + _CHUNK]


def _write(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]
