"""Copies of a run's tensors in host memory: all of a save that training waits for."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch

# Every tensor begins where any dtype may.
ALIGNMENT = 64


class Snapshot:
    """Host memory that tensors are copied into, save after save.

    For tensors on a GPU it is page-locked, so that the copy runs at the speed of the bus, and taken
    in one piece of the size needed: torch's own allocator would round it up to a power of two.
    Locking takes half a second a GiB, and is done once, before training.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._unlock: Any = None

    def reserve(self, size: int, *, page_locked: bool) -> None:
        """Have room for so many bytes; what was copied before is lost if more is needed."""
        if size <= self._memory.nbytes:
            return
        if self._unlock is not None:
            self._unlock()
        self._memory = torch.empty(size, dtype=torch.uint8)
        if page_locked:
            address = self._memory.data_ptr()
            if int(_cudart().cudaHostRegister(address, size, 0)) != 0:
                # A host that locks no more memory: copies are slower, and as good.
                return
            # Memory that is given back while it is locked breaks later allocations at its address.
            self._unlock = weakref.finalize(self, _cudart().cudaHostUnregister, address)
            self._unlock.atexit = False

    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy tensors.

        Args:
            tensors: On any device.

        Returns:
            CPU tensors with their values, good until the next call.
        """
        sizes = {name: -(-t.nbytes // ALIGNMENT) * ALIGNMENT for name, t in tensors.items()}
        on_gpu = any(tensor.device.type == "cuda" for tensor in tensors.values())
        self.reserve(sum(sizes.values()), page_locked=on_gpu)
        copies, offset = {}, 0
        for name, tensor in tensors.items():
            flat = self._memory[offset : offset + tensor.nbytes]
            copies[name] = flat.view(tensor.dtype).view(tensor.shape)
            copies[name].copy_(tensor.detach(), non_blocking=True)
            offset += sizes[name]
        if on_gpu:
            torch.cuda.synchronize()
        return copies


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
