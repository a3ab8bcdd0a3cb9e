"""Kernels against the operations of torch that they stand for, rounding for rounding."""

import pytest
import torch
from torch.nn import functional
from transformers.models.llama import modeling_llama

from qlora_dist.train import pointwise
from qlora_dist.train.compiler import can_compile

pytestmark = pytest.mark.gpu(1)


@pytest.fixture(autouse=True)
def compiler():
    if not can_compile():
        pytest.skip("needs Triton and a C compiler")
    torch.manual_seed(0)


def draw(*shape):
    return torch.randn(shape, device="cuda").to(torch.bfloat16)


def grads(outputs, inputs, seed=1):
    """Gradients of the inputs for a random one of the outputs."""
    torch.manual_seed(seed)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.autograd.grad(outputs, inputs, [draw(*out.shape) for out in outputs])


# 1 x 7 does not fill a block; 22,016 is LLaMA-65B's.
@pytest.mark.parametrize("shape", [(1, 7), (2, 130, 22016)])
def test_a_gate_is_torchs(shape):
    gate, up = draw(*shape).requires_grad_(), draw(*shape).requires_grad_()
    theirs, ours = functional.silu(gate) * up, pointwise._Gate.apply(gate, up)
    assert torch.equal(ours, theirs)
    for own, other in zip(grads(ours, (gate, up)), grads(theirs, (gate, up)), strict=True):
        different = own != other
        assert different.float().mean() < 1e-3
        torch.testing.assert_close(own, other, rtol=2**-7, atol=1e-6)


# Heads that are not a multiple of a block, and 96 wide, which is no power of two.
@pytest.mark.parametrize(("heads", "width"), [(64, 128), (3, 96)])
@pytest.mark.parametrize("tables", [1, 2])
def test_a_rotation_is_transformers(heads, width, tables):
    x = draw(2, 50, heads, width).transpose(1, 2).requires_grad_()
    angles = torch.randn(tables, 50, width // 2, device="cuda").repeat(1, 1, 2)
    cos, sin = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
    wide_cos, wide_sin = cos.unsqueeze(1), sin.unsqueeze(1)
    theirs = (x * wide_cos) + (modeling_llama.rotate_half(x) * wide_sin)
    ours = pointwise._Rotation.apply(x, cos, sin)
    assert ours.stride() == theirs.stride()
    assert torch.equal(ours, theirs)
    assert torch.equal(grads(ours, (x,))[0], grads(theirs, (x,))[0])


def test_a_norm_is_the_formula():
    x, weight = draw(2, 100, 8192).requires_grad_(), draw(8192)
    ours = pointwise._Norm.apply(x, weight, 1e-6)
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
    wanted = exact.to(torch.bfloat16) * weight
    assert (ours != wanted).float().mean() < 1e-2
    torch.testing.assert_close(ours, wanted, rtol=2**-7, atol=1e-6)
    own, other = grads(ours, (x,))[0].double(), grads(exact * weight, (x,))[0].double()
    assert (own - other).norm() < 1e-2 * other.norm()
