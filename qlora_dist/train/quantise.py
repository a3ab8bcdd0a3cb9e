"""Quantising to NF4 by rows, with the bytes that bitsandbytes makes of the whole matrix.

A block of 64 weights lies within a row, so rows can be quantised apart, by whoever owns them. The
second quantisation goes over all of a matrix's constants; it alone needs them together. The
arithmetic is bitsandbytes' own.
"""

from dataclasses import dataclass

import torch
from bitsandbytes import functional
from bitsandbytes.functional import QuantState

from qlora_dist.sizes import NESTED_BLOCK, NF4_BLOCK

# Bytes that a checksum takes at a time: it needs 24 times as much memory.
_SUM_BYTES = 4 << 20
# 2 ** 64 divided by the golden ratio, as a signed number: neighbours get weights far apart.
_SUM_FACTOR = 0x9E3779B97F4A7C15 - 2**64


@dataclass(frozen=True, eq=False)
class Constants:
    """What a matrix's quantisation needs beside the bytes of its rows; the same on every process.

    Attributes:
        shape: ``(out, in)`` of the matrix.
        dtype: What it was quantised from, and dequantises to.
        code: The 16 values of NF4, float32.
        nested: The second quantisation, of the blocks' constants; None without double quantisation.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    code: torch.Tensor
    nested: "Nested | None"

    def __deepcopy__(self, memo: object) -> "Constants":
        # torch.compile copies what a tensor subclass carries, and compares it by identity.
        return self

    def state(self, absmax: torch.Tensor) -> QuantState:
        """The matrix as bitsandbytes describes it.

        Args:
            absmax: Of every row, as :attr:`Nf4Tensor.absmax` has it; further rows are cut off.
        """
        num_blocks = self.shape[0] * self.shape[1] // NF4_BLOCK
        second = None
        if self.nested is None:
            absmax = absmax.reshape(-1).view(torch.float32)
        else:
            second = QuantState(
                absmax=self.nested.absmax,
                code=self.nested.code,
                blocksize=NESTED_BLOCK,
                dtype=torch.float32,
            )
        return QuantState(
            absmax=absmax.reshape(-1)[:num_blocks],
            shape=torch.Size(self.shape),
            dtype=self.dtype,
            blocksize=NF4_BLOCK,
            code=self.code,
            quant_type="nf4",
            offset=None if self.nested is None else self.nested.offset,
            state2=second,
        )


@dataclass(frozen=True, eq=False)
class Nested:
    """The second quantisation of a matrix.

    Attributes:
        absmax: One float32 for 256 blocks, over the whole matrix: such a block may begin in one
            row and end in another, so rows do not own them.
        code: The 256 values of bitsandbytes' dynamic map, float32.
        offset: Mean of the blocks' constants, a float32 scalar.
    """

    absmax: torch.Tensor
    code: torch.Tensor
    offset: torch.Tensor


def absmax_bytes(in_features: int, *, double: bool) -> int:
    """Bytes of the blocks' constants of one row."""
    return in_features // NF4_BLOCK * (1 if double else 4)


def quantise_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise whole rows of a matrix.

    Args:
        rows: ``(n, in)``, in the dtype of the computation; ``in`` is a multiple of 64, so that no
            block reaches over the end of a row.

    Returns:
        ``(packed, absmax)``: uint8 of shape ``(n, in / 2)`` and float32 of shape ``(n, in / 64)``.
    """
    count, width = rows.shape
    packed, state = functional.quantize_4bit(rows, blocksize=NF4_BLOCK, quant_type="nf4")
    return packed.view(count, width // 2), state.absmax.view(count, width // NF4_BLOCK)


def nest(absmax: torch.Tensor) -> tuple[torch.Tensor, Nested]:
    """Quantise the constants of a whole matrix again.

    Args:
        absmax: Float32 of shape ``(out, in / 64)``, contiguous. The mean must be taken of all of it
            in one call: it has other bits when it is put together from means of parts.

    Returns:
        ``(absmax, nested)``, the first as uint8 of the same shape.
    """
    flat = absmax.reshape(-1)
    offset = flat.mean()
    quantised, state = functional.quantize_blockwise(flat - offset, blocksize=NESTED_BLOCK)
    return quantised.view(absmax.shape), Nested(state.absmax, state.code, offset)


def constants(
    shape: tuple[int, int], dtype: torch.dtype, nested: Nested | None, device: torch.device
) -> Constants:
    """The constants of a matrix."""
    code = functional.get_4bit_type("nf4", device=device)
    return Constants(shape, dtype, code, nested)


def checksum(data: torch.Tensor, first: int) -> torch.Tensor:
    """A sum over bytes, each weighted by its place; sums of parts add up to that of the whole.

    It finds damage of storage or memory at the speed of the device's memory. It is no defence.

    Args:
        data: uint8, of any shape.
        first: Place of its first byte in the whole.

    Returns:
        An int64 scalar on the device, modulo 2 ** 64.
    """
    flat = data.reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, len(flat), _SUM_BYTES):
        part = flat[start : start + _SUM_BYTES].to(torch.int64)
        begin = first + start
        places = torch.arange(begin, begin + len(part), device=data.device)
        total += ((part + 1) * (places * _SUM_FACTOR | 1)).sum()
    return total
