"""Copies of a run's tensors in host memory: all of a save that training waits for."""

from collections.abc import Mapping
from typing import Any

import torch


class Snapshot:
    """Host memory that tensors are copied into, save after save.

    For tensors on a GPU it is page-locked, so that the copy runs at the speed of the bus, and
    taken in one piece of exactly the size needed: torch's own allocator would round it up to a
    power of two. It grows if the tensors do.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy tensors.

        Args:
            tensors: On any device.

        Returns:
            CPU tensors with their values, good until the next call.
        """
        sizes = {name: _aligned(tensor.nbytes) for name, tensor in tensors.items()}
        on_gpu = any(tensor.device.type == "cuda" for tensor in tensors.values())
        self._reserve(sum(sizes.values()), page_locked=on_gpu)
        copies, offset = {}, 0
        for name, tensor in tensors.items():
            flat = self._memory[offset : offset + tensor.nbytes]
            copies[name] = flat.view(tensor.dtype).view(tensor.shape)
            copies[name].copy_(tensor.detach(), non_blocking=True)
            offset += sizes[name]
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _reserve(self, size: int, *, page_locked: bool) -> None:
        if size <= self._memory.nbytes:
            return
        if self._memory.nbytes and page_locked:
            _check(_cudart().cudaHostUnregister(self._memory.data_ptr()))
        self._memory = torch.empty(size, dtype=torch.uint8)
        if page_locked:
            _check(_cudart().cudaHostRegister(self._memory.data_ptr(), size, 0))


def _aligned(size: int) -> int:
    """Rounded up so that every tensor begins where any dtype may."""
    return -(-size // 64) * 64


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check(code: object) -> None:
    if int(code) != 0:  # type: ignore[call-overload]
        raise RuntimeError(f"CUDA could not lock or unlock host memory: {code}")
