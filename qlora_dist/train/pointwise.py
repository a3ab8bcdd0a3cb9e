"""What a decoder layer computes between its large products, in one pass over memory each.

transformers computes a norm, a gate or a rotation one operation after the other: each reads and
writes whole activations, and keeps some in float32. Here each is one function that keeps what it
was given, and on a GPU one kernel each way (qlora_dist.train.triton_pointwise) that rounds where
transformers rounds; a norm's sum has another order. Runs in bf16 train so
(qlora_dist.train.adapters); evaluation, and rotations on other devices, are transformers' own.
"""

import sys
from collections.abc import Callable
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from qlora_dist.shapes import FAMILIES

_SILU = ("SiLU", "SiLUActivation")


def fuse(model: nn.Module) -> None:
    """Have the norms, gates and rotations of a decoder of a known family computed so in training.

    Args:
        model: A decoder, maybe inside of a ``PeftModel``.
    """
    for module in model.modules():
        source = sys.modules[type(module).__module__]
        if source.__name__.rpartition(".modeling_")[2] not in FAMILIES:
            continue
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_norm, module)
        elif type(module).__name__.endswith("MLP") and type(module.act_fn).__name__ in _SILU:
            module.forward = MethodType(_mlp, module)
        if hasattr(source, "apply_rotary_pos_emb"):
            _fuse_rotation(source)


def _norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    if not self.training:
        theirs: torch.Tensor = type(self).forward(self, x)
        return theirs
    y: torch.Tensor = _Norm.apply(x, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
    return y


def _mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    if not self.training:
        theirs: torch.Tensor = type(self).forward(self, x)
        return theirs
    y: torch.Tensor = self.down_proj(_Gate.apply(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-untyped-call]
    return y


def _fuse_rotation(source: ModuleType) -> None:
    """Put one kernel in the place of a family's function, on GPUs."""
    theirs: Callable[..., Any] = source.apply_rotary_pos_emb
    if hasattr(theirs, "fused"):
        return

    def rotate(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        # What is rotated are all numbers of a head, with heads before positions.
        if not q.is_cuda or unsqueeze_dim != 1 or cos.shape[-1] != q.shape[-1] or not _compiled():
            return theirs(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return tuple(_Rotation.apply(x, cos, sin) for x in (q, k))  # type: ignore[no-untyped-call]

    rotate.fused = True  # type: ignore[attr-defined]
    source.apply_rotary_pos_emb = rotate  # type: ignore[attr-defined]


class _Norm(torch.autograd.Function):
    """``weight * (x / rms(x))``: the quotient in float32, rounded, then the product."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y, rstd = normalised(x, eps)
        ctx.save_for_backward(x, rstd, weight)
        return y.mul_(weight.to(y.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, rstd, weight = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[1]:
            each = grad * (x.float() * rstd).to(x.dtype)
            grad_weight = each.view(-1, x.shape[-1]).sum(0, dtype=torch.float32).to(weight.dtype)
            del each
        return normalised_backward(grad * weight.to(grad.dtype), x, rstd), grad_weight, None


class _Gate(torch.autograd.Function):
    """``silu(gate) * up``."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return gated_backward(grad, *ctx.saved_tensors)


class _Rotation(torch.autograd.Function):
    """Rotary embedding; there and back it is the same, the other way round."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        from qlora_dist.train.triton_pointwise import rotated

        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        from qlora_dist.train.triton_pointwise import rotated

        return rotated(grad, *ctx.saved_tensors, back=True), None, None


def normalised(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``x / rms(x)`` over the last dimension.

    Args:
        x: ``(..., width)``.
        eps: Added to the mean square.

    Returns:
        The quotient, in the dtype of ``x``, and ``1 / rms(x)``, float32 of shape ``(..., 1)``.
    """
    if x.is_cuda:
        y, rstd = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], None, eps)
        return y, rstd
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd).to(x.dtype), rstd


def normalised_backward(grad: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    """Gradient of :func:`normalised` with respect to ``x``."""
    if x.is_cuda:
        found: torch.Tensor = torch.ops.aten._fused_rms_norm_backward(
            grad, x, [x.shape[-1]], rstd, None, [True, False]
        )[0]
        return found
    unit, wide = x.float() * rstd, grad.float()
    return (rstd * (wide - unit * (wide * unit).mean(-1, keepdim=True))).to(x.dtype)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, rounded twice; all of one shape."""
    if gate.is_cuda and _compiled():
        from qlora_dist.train import triton_pointwise

        return triton_pointwise.gated(gate, up)
    return nn.functional.silu(gate) * up


def gated_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of :func:`gated` with respect to ``gate`` and ``up``."""
    if gate.is_cuda and _compiled():
        from qlora_dist.train import triton_pointwise

        return triton_pointwise.gated_backward(grad, gate, up)
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return grad_gate, nn.functional.silu(gate).mul_(grad)


def _compiled() -> bool:
    """Whether this machine can compile kernels; without, each is a few of torch's."""
    from qlora_dist.train.compiler import can_compile

    return can_compile()
