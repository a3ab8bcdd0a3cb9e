"""Kernels of qlora_dist.train.dropout; imported where there is a GPU only.

Each works on tiles of 64 tokens and 128 columns, and draws a tile's mask where it needs it. A sum
that is cut into parts, for more programs to share, is put together in one fixed order.
"""
# Triton's arguments are pointers, numbers and constants; it has no types for them.
# ruff: noqa: ANN001
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from qlora_dist.sizes import DROPOUT_PARTS_BYTES

# Philox gives 128 bits at a time: 16 for each of eight neighbours.
_LEVELS = 2**16
_LANES = 16
_COLUMNS = 8 * _LANES
_ROWS = 64
_RANK = 64
# Enough for a large GPU to have work while others wait for memory, and what their parts take.
_PROGRAMS = DROPOUT_PARTS_BYTES // (_RANK * _COLUMNS * 4)


@triton.jit
def _kept(seed, level, row, chunk, chunks, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Which of ``(ROWS, 8 * LANES)`` elements stay."""
    place = (row[:, None] * chunks + chunk) * LANES + tl.arange(0, LANES)[None, :]
    # Seven rounds pass all tests of randomness (Salmon et al., SC 2011, table 2).
    a, b, c, d = tl.randint4x(seed, place, 7)
    words = tl.join(tl.join(a, b), tl.join(c, d)).reshape(ROWS, 4 * LANES)
    halves = tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF).reshape(ROWS, 8 * LANES)
    return halves >= level


@triton.jit
def _tile(pointer, row, column, rows, columns):
    """``pointer[row, column]`` of a dense matrix; zero outside."""
    inside = (row < rows) & (column < columns)
    return tl.load(pointer + row.to(tl.int64) * columns + column, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["seed"])
def _inner(
    x, a, out, seed, level, scale, tokens, width, rank, chunks, each,
    LANES: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    unit = tl.program_id(2) * RANK + tl.arange(0, RANK)
    found = tl.zeros((ROWS, RANK), tl.float32)
    for step in range(each):
        chunk = part * each + step
        column = chunk * 8 * LANES + tl.arange(0, 8 * LANES)
        value = _tile(x, row[:, None], column[None, :], tokens, width)
        kept = _kept(seed, level, row, chunk, chunks, LANES, ROWS)
        matrix = _tile(a, unit[:, None], column[None, :], rank, width)
        found = tl.dot(tl.where(kept, value, 0.0), matrix.trans(), found)
    inside = (row[:, None] < tokens) & (unit[None, :] < rank)
    at = (part.to(tl.int64) * tokens + row[:, None]) * rank + unit[None, :]
    tl.store(out + at, found * scale, mask=inside)


@triton.jit(do_not_specialize=["seed"])
def _outer(
    grad, x, out, seed, level, scale, tokens, width, rank, chunks, each,
    LANES: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    chunk, part = tl.program_id(0), tl.program_id(1)
    unit = tl.program_id(2) * RANK + tl.arange(0, RANK)
    column = chunk * 8 * LANES + tl.arange(0, 8 * LANES)
    found = tl.zeros((RANK, 8 * LANES), tl.float32)
    for step in range(each):
        row = (part * each + step) * ROWS + tl.arange(0, ROWS)
        value = _tile(x, row[:, None], column[None, :], tokens, width)
        kept = _kept(seed, level, row, chunk, chunks, LANES, ROWS)
        given = _tile(grad, row[:, None], unit[None, :], tokens, rank)
        found = tl.dot(given.trans(), tl.where(kept, value, 0.0), found)
    inside = (unit[:, None] < rank) & (column[None, :] < width)
    at = (part.to(tl.int64) * rank + unit[:, None]) * width + column[None, :]
    tl.store(out + at, found * scale, mask=inside)


@triton.jit(do_not_specialize=["seed"])
def _back(
    grad, a, out, seed, level, scale, tokens, width, rank, chunks,
    LANES: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(1)
    column = chunk * 8 * LANES + tl.arange(0, 8 * LANES)
    found = tl.zeros((ROWS, 8 * LANES), tl.float32)
    for first in range(0, rank, RANK):
        unit = first + tl.arange(0, RANK)
        given = _tile(grad, row[:, None], unit[None, :], tokens, rank)
        matrix = _tile(a, unit[:, None], column[None, :], rank, width)
        found = tl.dot(given, matrix, found)
    kept = _kept(seed, level, row, chunk, chunks, LANES, ROWS)
    old = _tile(out, row[:, None], column[None, :], tokens, width).to(tl.float32)
    new = old + tl.where(kept, found * scale, 0.0)
    inside = (row[:, None] < tokens) & (column[None, :] < width)
    at = row[:, None].to(tl.int64) * width + column[None, :]
    tl.store(out + at, new.to(out.dtype.element_ty), mask=inside)


def inner(x: torch.Tensor, a: torch.Tensor, seed: int, p: float) -> torch.Tensor:
    """``dropout(x) @ a.T`` in the dtype of ``x``; arguments as in qlora_dist.train.dropout."""
    tokens, width, rank = *x.shape, len(a)
    rows, chunks, (padded, ranks) = _blocks(tokens), _chunks(width), _ranks(rank)
    each, parts = _share(chunks, rows * ranks)
    out = x.new_empty(parts, tokens, rank, dtype=torch.float32)
    _inner[(rows, parts, ranks)](
        x, a, out, seed, *_drop(p), tokens, width, rank, chunks, each,
        LANES=_LANES, ROWS=_ROWS, RANK=padded, num_stages=2,
    )  # fmt: skip
    return out.sum(0).to(x.dtype)


def outer(grad: torch.Tensor, x: torch.Tensor, seed: int, p: float) -> torch.Tensor:
    """``grad.T @ dropout(x)`` in float32."""
    tokens, width, rank = *x.shape, grad.shape[1]
    rows, chunks, (padded, ranks) = _blocks(tokens), _chunks(width), _ranks(rank)
    each, parts = _share(rows, chunks * ranks)
    out = x.new_empty(parts, rank, width, dtype=torch.float32)
    _outer[(chunks, parts, ranks)](
        grad, x, out, seed, *_drop(p), tokens, width, rank, chunks, each,
        LANES=_LANES, ROWS=_ROWS, RANK=padded, num_stages=2,
    )  # fmt: skip
    return out.sum(0) if parts > 1 else out[0]


def add_back(out: torch.Tensor, grad: torch.Tensor, a: torch.Tensor, seed: int, p: float) -> None:
    """Add ``dropout(grad @ a)`` to ``out``."""
    tokens, width, rank = *out.shape, len(a)
    chunks = _chunks(width)
    _back[(_blocks(tokens), chunks)](
        grad, a, out, seed, *_drop(p), tokens, width, rank, chunks,
        LANES=_LANES, ROWS=_ROWS, RANK=_ranks(rank)[0],
    )  # fmt: skip


def _drop(p: float) -> tuple[int, float]:
    """What a draw must reach, and what is kept is multiplied with."""
    level = min(round(p * _LEVELS), _LEVELS - 1)
    return level, _LEVELS / (_LEVELS - level)


def _blocks(tokens: int) -> int:
    return triton.cdiv(tokens, _ROWS)


def _chunks(width: int) -> int:
    return triton.cdiv(width, _COLUMNS)


def _ranks(rank: int) -> tuple[int, int]:
    """A power of two that Triton's products take, and how many such blocks there are."""
    padded = min(_RANK, max(16, triton.next_power_of_2(rank)))
    return padded, triton.cdiv(rank, padded)


def _share(steps: int, others: int) -> tuple[int, int]:
    """Cut a sum of so many steps: steps in each part, and parts."""
    each = triton.cdiv(steps, max(1, _PROGRAMS // others))
    return each, triton.cdiv(steps, each)
