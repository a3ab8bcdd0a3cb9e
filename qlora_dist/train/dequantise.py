"""A part of an NF4 matrix as numbers: one kernel on a GPU, bitsandbytes' operators elsewhere.

bitsandbytes dequantises contiguous bytes only, and doubly quantised constants all at once, in a
pass of their own. A kernel of ours (qlora_dist.train.triton_nf4) takes any rows and columns as they
lie, and makes the same bits.
"""

import torch

from qlora_dist.sizes import NESTED_BLOCK, NF4_BLOCK
from qlora_dist.train.compiler import can_compile
from qlora_dist.train.nf4 import Nf4Tensor

_BITSANDBYTES = torch.ops.bitsandbytes


def dequantised(
    weight: Nf4Tensor, rows: tuple[int, int], columns: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Rows and columns of a matrix, in memory of their own.

    Args:
        weight: The matrix, whole.
        rows: The first, and the one behind the last.
        columns: The same, both multiples of 64.
        dtype: What the numbers are to be.

    Returns:
        ``(rows, columns)`` of them.
    """
    constants = weight.constants
    assert constants is not None
    (top, bottom), (left, right) = rows, columns
    code, nested, blocks = constants.code, constants.nested, constants.shape[1] // NF4_BLOCK
    packed = weight.packed[top:bottom, left // 2 : right // 2]
    absmax = weight.absmax if nested is not None else weight.absmax.view(torch.float32)
    part = slice(left // NF4_BLOCK, right // NF4_BLOCK)
    if packed.is_cuda and can_compile():
        from qlora_dist.train import triton_nf4

        return triton_nf4.dequantised(
            packed,
            absmax[top:bottom, part],
            code,
            nested,
            dtype,
            first=top * blocks + part.start,
            blocks=blocks,
        )
    if nested is not None:
        # Its blocks begin anywhere in a row: all constants, then those that are wanted.
        whole = absmax[: constants.shape[0]]
        absmax = _BITSANDBYTES.dequantize_blockwise(
            whole, nested.absmax, nested.code, NESTED_BLOCK, torch.float32
        )
        absmax += nested.offset
    found: torch.Tensor = _BITSANDBYTES.dequantize_4bit(
        packed.contiguous(),
        absmax[top:bottom, part].contiguous(),
        NF4_BLOCK,
        "nf4",
        (bottom - top, right - left),
        dtype,
    )
    return found
