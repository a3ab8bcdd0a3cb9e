"""A frozen matrix and its adapter as one product, forward and backward.

PEFT computes the adapter's part beside the base's and adds it: on the way there and back that reads
and writes each activation several times more, and keeps copies of what the layer was given. Here
the adapter's part is added where the base's product already lies, and only the input, shared by
all layers that are given the same, is kept. A large quantised matrix is dequantised in slices. Runs
in bf16 train so (qlora_dist.train.adapters).
"""

import math
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from torch import nn

from qlora_dist.sizes import NF4_BLOCK, dequantised_slices
from qlora_dist.train import dropout
from qlora_dist.train.dequantise import dequantised
from qlora_dist.train.nf4 import Nf4Linear, Nf4Tensor


def fuse(model: nn.Module) -> None:
    """Have every layer with an adapter compute both in one, in training mode.

    In evaluation mode PEFT's own code runs: it is what whoever loads the adapter will run.

    Args:
        model: A ``PeftModel``.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = MethodType(_forward, module)


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if not self.training or self.disable_adapters or self.merged:
        result: torch.Tensor = type(self).forward(self, x, *args, **kwargs)
        return result
    (name,) = self.active_adapters
    drop, layer = self.lora_dropout[name], self.get_base_layer()
    h, a, b = _Inner.apply(  # type: ignore[no-untyped-call]
        x,
        self.lora_A[name].weight,
        self.lora_B[name].weight,
        _dtype_of(layer),
        drop.p if isinstance(drop, nn.Dropout) else 0.0,
    )
    result = _Product.apply(x, h, a, b, layer, self.scaling[name])  # type: ignore[no-untyped-call]
    return result


class _Inner(torch.autograd.Function):
    """``h = dropout(x) @ A.T``, and all that the whole product keeps for its backward pass.

    A function's tensors are kept when it has run. When activations are recomputed, that ends with
    the last tensor that a layer keeps: it is kept here, and the layer's last large product is not
    computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        dtype: torch.dtype,
        p: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        flat, low = _flat(x, dtype), a.to(dtype)
        seed = dropout.draw_seed() if p else 0
        h = dropout.inner(flat, low, seed, p) if p else flat @ low.T
        ctx.p, ctx.seed = p, seed
        ctx.save_for_backward(x, h, a, b)
        ctx.mark_non_differentiable(h)
        # Only two of the outputs have gradients, those that the product gives.
        ctx.set_materialize_grads(False)
        return h, a.view_as(a), b.view_as(b)

    @staticmethod
    def backward(ctx: Any, _: Any, grad_a: torch.Tensor, grad_b: torch.Tensor) -> Any:
        # The product has made them of what is kept here.
        return None, grad_a, grad_b, None, None


class _Product(torch.autograd.Function):
    """``x @ W.T + bias + scaling * h @ B.T``, of what :class:`_Inner` returns."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        h: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        layer: nn.Linear,
        scaling: float,
    ) -> torch.Tensor:
        y = _times(_flat(x, h.dtype), layer)
        y.addmm_(h, b.to(h.dtype).T, alpha=scaling)
        # Not the matrix: under FSDP2 its memory is given back, and the layer has it again later.
        ctx.inner, ctx.layer, ctx.scaling = a.grad_fn, layer, scaling
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, h, a, b = ctx.inner.saved_tensors
        dtype, layer, scaling = h.dtype, ctx.layer, ctx.scaling
        p, seed = ctx.inner.p, ctx.inner.seed
        grad_x = grad_a = grad_b = None
        g = _flat(grad, dtype)
        if ctx.needs_input_grad[3]:
            grad_b = (g.T @ h).mul_(scaling).to(b.dtype)
        grad_h = (g @ b.to(dtype)).mul_(scaling)
        if ctx.needs_input_grad[2]:
            flat = _flat(x, dtype)
            grad_a = dropout.outer(grad_h, flat, seed, p) if p else grad_h.T @ flat
            grad_a = grad_a.to(a.dtype)
            del flat
        if ctx.needs_input_grad[0]:
            grad_x = _times_transposed(g, layer)
            if p:
                dropout.add_back(grad_x, grad_h, a.to(dtype), seed, p)
            else:
                grad_x.addmm_(grad_h, a.to(dtype))
            grad_x = grad_x.view(x.shape).to(x.dtype)
        return grad_x, None, grad_a, grad_b, None, None


def _flat(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A row for each token, dense."""
    return x.to(dtype).reshape(-1, x.shape[-1]).contiguous()


def _dtype_of(layer: nn.Linear) -> torch.dtype:
    return layer.compute_dtype if isinstance(layer, Nf4Linear) else layer.weight.dtype


def _times(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """``x @ W.T + bias``, in new memory.

    Args:
        x: Shape ``(tokens, in)``.
        layer: The frozen layer.
    """
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    if not isinstance(layer, Nf4Linear):
        return nn.functional.linear(x, layer.weight, bias)
    weight: Nf4Tensor = layer.weight  # type: ignore[assignment]
    rows, width = layer.out_features, layer.in_features
    parts = dequantised_slices(rows, width, x.element_size(), len(x))
    if parts == 1:
        return nn.functional.linear(x, dequantised(weight, (0, rows), (0, width), x.dtype), bias)
    y = x.new_empty(len(x), rows)
    for begin, end in block_ranges(rows, parts):
        part = dequantised(weight, (begin, end), (0, width), x.dtype)
        torch.mm(x, part.T, out=y[:, begin:end])
        # Before the next one is made.
        del part
    return y if bias is None else y.add_(bias)


def _times_transposed(g: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """``g @ W``, in new memory.

    Args:
        g: Shape ``(tokens, out)``.
        layer: The frozen layer.
    """
    if not isinstance(layer, Nf4Linear):
        return g @ layer.weight
    weight: Nf4Tensor = layer.weight  # type: ignore[assignment]
    rows, width = layer.out_features, layer.in_features
    parts = dequantised_slices(rows, width, g.element_size(), len(g))
    if parts == 1:
        return g @ dequantised(weight, (0, rows), (0, width), g.dtype)
    # By columns, so that no sum is cut in two.
    grad = g.new_empty(len(g), width)
    for columns in block_ranges(width, parts):
        part = dequantised(weight, (0, rows), columns, g.dtype)
        torch.mm(g, part, out=grad[:, slice(*columns)])
        del part
    return grad


def block_ranges(count: int, parts: int) -> list[tuple[int, int]]:
    """Rows or columns, cut at whole blocks into at most so many parts.

    A product that is written to a slice which begins in the middle of 16 bytes takes cuBLAS's
    slowest kernels: a whole step then took twice as long (H100, torch 2.11).
    """
    blocks = math.ceil(count / NF4_BLOCK)
    cuts = [min(count, blocks * i // parts * NF4_BLOCK) for i in range(parts + 1)]
    return [(begin, end) for begin, end in pairwise(cuts) if begin < end]
