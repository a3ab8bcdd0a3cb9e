"""Kernels of dropout and of dequantising, against the formula and against bitsandbytes."""

import bitsandbytes
import pytest
import torch

from qlora_dist.train import dropout
from qlora_dist.train.compiler import can_compile
from qlora_dist.train.dequantise import dequantised
from qlora_dist.train.nf4 import Nf4Tensor
from qlora_dist.train.quantise import constants, nest, quantise_rows

pytestmark = pytest.mark.gpu(1)
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def compiler():
    if not can_compile():
        pytest.skip("needs Triton and a C compiler")
    torch.manual_seed(0)


def draw(*shape):
    return torch.randn(shape, device=GPU).to(torch.bfloat16)


def mask_of(tokens, width, seed, p):
    """What an element is multiplied with: the product of ones and of each column's unit vector."""
    ones, unit = draw(tokens, width).fill_(1), torch.eye(width, device=GPU, dtype=torch.bfloat16)
    rows = [dropout.inner(ones, part.contiguous(), seed, p) for part in unit.split(64)]
    return (torch.cat(rows, 1) > 0) / (1 - p)


# Tokens, widths and ranks that fill their tiles and that do not; LLaMA-65B's width.
@pytest.mark.parametrize(
    ("tokens", "width", "rank", "p"),
    [(130, 192, 8, 0.5), (64, 256, 64, 0.125), (200, 1024, 100, 0.25), (4096, 22016, 64, 0.0625)],
)
def test_products_behind_dropout_are_those_of_one_mask(tokens, width, rank, p):
    x, a, grad, old = (
        draw(tokens, width),
        draw(rank, width),
        draw(tokens, rank),
        draw(tokens, width),
    )
    seed = dropout.draw_seed()
    mask = mask_of(tokens, width, seed, p)
    assert (mask == 0).float().mean().item() == pytest.approx(p, abs=4 * (tokens * width) ** -0.5)
    new = old.clone()
    dropout.add_back(new, grad, a, seed, p)
    pairs = (
        (dropout.inner(x, a, seed, p), (x * mask).double() @ a.double().T),
        (dropout.outer(grad, x, seed, p), grad.double().T @ (x * mask).double()),
        (new, old.double() + (grad.double() @ a.double()) * mask),
    )
    for ours, exact in pairs:
        assert (ours.double() - exact).norm() < 4e-3 * exact.norm()
    again = dropout.inner(x, a, seed, p), dropout.outer(grad, x, seed, p)
    assert all(torch.equal(own, pair[0]) for own, pair in zip(again, pairs, strict=False))
    assert not torch.equal(dropout.inner(x, a, seed + 1, p), pairs[0][0])


@pytest.mark.parametrize("double", [True, False])
def test_any_part_of_a_matrix_has_bitsandbytes_bits(double):
    rows, width = 384, 5120
    matrix = draw(rows, width)
    packed, absmax = quantise_rows(matrix)
    # Every byte there is, in a part that is looked at.
    packed[100, :256] = torch.arange(256, device=GPU)
    nested = None
    if double:
        absmax, nested = nest(absmax)
    more = constants((rows, width), torch.bfloat16, nested, GPU)
    weight = Nf4Tensor(packed, absmax.view(torch.uint8), more, torch.bfloat16)
    whole = bitsandbytes.functional.dequantize_4bit(weight.flat(), weight.state())
    for top, bottom in ((0, rows), (64, 192)):
        for left, right in ((0, width), (64, 2560), (5056, width)):
            part = dequantised(weight, (top, bottom), (left, right), torch.bfloat16)
            assert torch.equal(part, whole[top:bottom, left:right])
