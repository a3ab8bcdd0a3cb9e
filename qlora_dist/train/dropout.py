"""Dropout on an adapter's input, inside the adapter's products.

A mask is a function of a seed: it is drawn again where it is needed, and neither it nor what it
leaves of an activation is ever written, on GPUs that kernels can be compiled for
(qlora_dist.train.triton_dropout). The seed comes from torch's CPU generator, so that recomputation
and a resumed run draw it again.
"""

import torch

from qlora_dist.train.compiler import can_compile


def draw_seed() -> int:
    """A seed of a mask."""
    # Of one width, whatever its value: a kernel is compiled for widths.
    return int(torch.empty((), dtype=torch.int64).random_(2**62, 2**63 - 1))


def inner(x: torch.Tensor, a: torch.Tensor, seed: int, p: float) -> torch.Tensor:
    """``dropout(x) @ a.T``.

    Args:
        x: ``(tokens, width)``, dense.
        a: ``(rank, width)`` of the same dtype, dense.
        seed: Of the mask.
        p: The part that is dropped; a GPU rounds it to a multiple of 2 ** -16.

    Returns:
        ``(tokens, rank)``.
    """
    if x.is_cuda and can_compile():
        from qlora_dist.train import triton_dropout

        return triton_dropout.inner(x, a, seed, p)
    return _dropped(x, seed, p) @ a.T


def outer(grad: torch.Tensor, x: torch.Tensor, seed: int, p: float) -> torch.Tensor:
    """``grad.T @ dropout(x)``: the gradient of ``a``, where ``grad`` is that of the inner product.

    Returns:
        ``(rank, width)``, in float32 or in the dtype of ``x``.
    """
    if x.is_cuda and can_compile():
        from qlora_dist.train import triton_dropout

        return triton_dropout.outer(grad, x, seed, p)
    return grad.T @ _dropped(x, seed, p)


def add_back(out: torch.Tensor, grad: torch.Tensor, a: torch.Tensor, seed: int, p: float) -> None:
    """Add ``dropout(grad @ a)``, the gradient of ``x``, to ``out`` of shape ``(tokens, width)``."""
    if out.is_cuda and can_compile():
        from qlora_dist.train import triton_dropout

        triton_dropout.add_back(out, grad, a, seed, p)
    else:
        out += _dropped(grad @ a, seed, p)


def _dropped(x: torch.Tensor, seed: int, p: float) -> torch.Tensor:
    generator = torch.Generator(x.device).manual_seed(seed)
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    return x * kept.bernoulli_(1 - p, generator=generator) / (1 - p)
