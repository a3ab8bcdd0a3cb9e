"""The kernel of qlora_dist.train.dequantise; imported where there is a GPU only."""
# Triton's arguments are pointers, numbers and constants; it has no types for them.
# ruff: noqa: ANN001
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from qlora_dist.sizes import NESTED_BLOCK, NF4_BLOCK
from qlora_dist.train.quantise import Nested

_BYTES = 512


@triton.jit
def _dequantised(
    packed, absmax, nested, levels, offset, code, out,
    width, packed_row, absmax_row, first, blocks,
    DOUBLE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    inside = at < width
    pair = tl.load(packed + row * packed_row + at, mask=inside, other=0).to(tl.int32)
    block = at // (BLOCK // 2)
    scale = tl.load(absmax + row * absmax_row + block, mask=inside, other=0)
    if DOUBLE:
        of_all = (first + row * blocks + block) // NESTED
        own = tl.load(nested + of_all, mask=inside, other=0.0)
        scale = tl.load(levels + scale.to(tl.int32)) * own + tl.load(offset)
    high = tl.load(code + (pair >> 4)) * scale
    low = tl.load(code + (pair & 15)) * scale
    numbers = tl.interleave(high, low).to(out.dtype.element_ty)
    place = tl.program_id(1) * 2 * BYTES + tl.arange(0, 2 * BYTES)
    tl.store(out + row * 2 * width + place, numbers, mask=place < 2 * width)


def dequantised(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    nested: Nested | None,
    dtype: torch.dtype,
    *,
    first: int,
    blocks: int,
) -> torch.Tensor:
    """A part of an NF4 matrix, with the bits that bitsandbytes makes of it.

    Args:
        packed: uint8 of shape ``(n, m / 2)`` whose rows may lie apart.
        absmax: ``(n, m / 64)`` whose rows may lie apart: uint8 with double quantisation, else
            float32.
        code: NF4's values, float32.
        nested: The second quantisation.
        dtype: Of the result.
        first: Of the matrix's blocks, the part's first.
        blocks: In a row of the matrix.

    Returns:
        ``(n, m)``.
    """
    rows, width = packed.shape
    out = torch.empty(rows, 2 * width, dtype=dtype, device=packed.device)
    # Without double quantisation they are not looked at.
    second = (absmax,) * 3 if nested is None else (nested.absmax, nested.code, nested.offset)
    _dequantised[(rows, triton.cdiv(width, _BYTES))](
        packed, absmax, *second, code, out,
        width, packed.stride(0), absmax.stride(0), first, blocks,
        DOUBLE=nested is not None, BLOCK=NF4_BLOCK, NESTED=NESTED_BLOCK, BYTES=_BYTES,
        # bitsandbytes rounds the product of the second quantisation before it adds the offset.
        enable_fp_fusion=False,
    )  # fmt: skip
    return out
