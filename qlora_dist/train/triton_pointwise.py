"""Kernels of qlora_dist.train.pointwise; imported where there is a GPU only.

All compute in float32 and round to the dtype of their operands wherever torch's own operations,
one after the other, would have rounded.
"""
# Triton's arguments are pointers, numbers and constants; it has no types for them.
# ruff: noqa: ANN001
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

_BLOCK = 1024
_HEADS = 8


@triton.jit
def _gated(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside)
    u = tl.load(up + at, mask=inside).to(tl.float32)
    wide = g.to(tl.float32)
    silu = tl.div_rn(wide, 1 + libdevice.exp(-wide)).to(g.dtype).to(tl.float32)
    tl.store(out + at, (silu * u).to(g.dtype), mask=inside)


@triton.jit
def _gated_backward(grad, gate, up, grad_gate, grad_up, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside)
    u = tl.load(up + at, mask=inside).to(tl.float32)
    d = tl.load(grad + at, mask=inside).to(tl.float32)
    wide = g.to(tl.float32)
    grown = 1 + libdevice.exp(-wide)
    silu = tl.div_rn(wide, grown).to(g.dtype).to(tl.float32)
    tl.store(grad_up + at, (d * silu).to(g.dtype), mask=inside)
    through = (d * u).to(g.dtype).to(tl.float32)
    sigmoid = tl.div_rn(1.0, grown)
    own = through * sigmoid * (1 + wide * (1 - sigmoid))
    tl.store(grad_gate + at, own.to(g.dtype), mask=inside)


@triton.jit
def _rotated(
    x, cos, sin, out,
    heads, seq, x_row, x_head, x_seq, out_row, out_head, out_seq, table_row, table_seq,
    BACK: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row, position = tl.program_id(0).to(tl.int64) // seq, tl.program_id(0).to(tl.int64) % seq
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, PADDED)[None, :]
    wanted = column < HALF
    table = row * table_row + position * table_seq + column
    c = tl.load(cos + table, mask=wanted).to(tl.float32)
    s = tl.load(sin + table, mask=wanted).to(tl.float32)
    if BACK:
        s = -s
    inside = wanted & (head < heads)
    first = x + row * x_row + head * x_head + position * x_seq + column
    a = tl.load(first, mask=inside)
    b = tl.load(first + HALF, mask=inside)
    kind = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    upper = (a * c).to(kind).to(tl.float32) - (b * s).to(kind).to(tl.float32)
    lower = (b * c).to(kind).to(tl.float32) + (a * s).to(kind).to(tl.float32)
    place = out + row * out_row + head * out_head + position * out_seq + column
    tl.store(place, upper.to(kind), mask=inside)
    tl.store(place + HALF, lower.to(kind), mask=inside)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, all of one shape, on a GPU."""
    gate, up = gate.contiguous(), up.contiguous()
    out, count = torch.empty_like(gate), gate.numel()
    _gated[(triton.cdiv(count, _BLOCK),)](gate, up, out, count, BLOCK=_BLOCK)
    return out


def gated_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of :func:`gated` with respect to its two operands."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grads, count = (torch.empty_like(gate), torch.empty_like(up)), gate.numel()
    _gated_backward[(triton.cdiv(count, _BLOCK),)](grad, gate, up, *grads, count, BLOCK=_BLOCK)
    return grads


def rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool = False
) -> torch.Tensor:
    """Rotary embedding of the pairs that are half a head apart.

    Args:
        x: ``(rows, heads, seq, head_dim)``, in any order in memory whose last is dense.
        cos: ``(rows or 1, seq, head_dim)``; the second half of a head repeats the first.
        sin: As ``cos``.
        back: Whether the other way round, as a gradient goes.

    Returns:
        As ``x``, and in the same order in memory.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    out, half = torch.empty_like(x), x.shape[-1] // 2
    rows, heads, seq = x.shape[:3]
    cos, sin = cos.contiguous(), sin.contiguous()
    _rotated[(rows * seq, triton.cdiv(heads, _HEADS))](
        x, cos, sin, out,
        heads, seq, *x.stride()[:3], *out.stride()[:3],
        cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
        BACK=back, HALF=half, PADDED=triton.next_power_of_2(half), HEADS=_HEADS,
        # Else product and sum become one operation of bf16, rounded once.
        enable_fp_fusion=False,
    )  # fmt: skip
    return out
