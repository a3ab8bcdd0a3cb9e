"""Writing safetensors files tensor by tensor, hashed as they are written.

The safetensors library wants all tensors of a file at once and keeps Python's lock while it writes.
This holds one tensor at a time, and leaves the other threads (a training loop) running. The format:
https://github.com/huggingface/safetensors#format.
"""

import hashlib
import json
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
class Entry:
    """One tensor of a file that is to be written.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
        make: Gives the tensor, on any device, when its turn comes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
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
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        header = _header(entries, metadata)
        digest.update(header)
        _write(file.fileno(), memoryview(header))
        for name, entry in entries.items():
            on_tensor()
            tensor = entry.make().detach().cpu().contiguous()
            assert tensor.dtype == entry.dtype, name
            assert tuple(tensor.shape) == entry.shape, name
            for chunk in _chunks(tensor):
                digest.update(chunk)
                _write(file.fileno(), chunk)
        os.fsync(file.fileno())
    return digest.hexdigest()


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str] | None) -> bytes:
    tree: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, entry in entries.items():
        size = entry.dtype.itemsize * _count(entry.shape)
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


def _count(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _chunks(tensor: torch.Tensor) -> Iterable[memoryview]:
    if tensor.numel() == 0:
        return
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(data), _CHUNK):
        yield data[start : start + _CHUNK]


def _write(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]
