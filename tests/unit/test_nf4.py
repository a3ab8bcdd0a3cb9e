"""NF4 weights as rows of bytes: quantising, cutting, joining, summing."""

from itertools import pairwise

import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.train.fill import Share
from qlora_dist.train.nf4 import Nf4Tensor
from qlora_dist.train.quantise import checksum, constants, nest, quantise_rows

CPU = torch.device("cpu")


def matrix(rows, width, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 5),
    size=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_rows_of_any_number_of_ranks_are_the_bytes_of_the_whole(rows, blocks, size, dtype, seed):
    whole = matrix(rows, 64 * blocks, seed).to(dtype)
    wanted, state = functional.quantize_4bit(
        whole, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    packed, absmax, covered = [], [], []
    for rank in range(size):
        first, count = Share(rank, size).rows(rows)
        covered += range(first, first + count)
        if count:
            part = quantise_rows(whole[first : first + count])
            packed.append(part[0])
            absmax.append(part[1])
    assert covered == list(range(rows))
    assert torch.equal(torch.cat(packed).reshape(-1), wanted.reshape(-1))
    quantised, nested = nest(torch.cat(absmax))
    assert torch.equal(quantised.reshape(-1), state.absmax)
    assert torch.equal(nested.absmax, state.state2.absmax)
    assert torch.equal(nested.offset, state.offset)


def test_an_nf4_weight_dequantises_as_bitsandbytes_does():
    whole = matrix(6, 128).to(torch.bfloat16)
    packed, absmax = quantise_rows(whole)
    absmax, nested = nest(absmax)
    weight = Nf4Tensor(packed, absmax, constants((6, 128), whole.dtype, nested, CPU), whole.dtype)
    wanted, state = functional.quantize_4bit(
        whole, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    ours = functional.dequantize_4bit(weight.flat(), weight.state())
    assert torch.equal(ours, functional.dequantize_4bit(wanted, state))


def test_an_nf4_weight_is_never_cast():
    weight = Nf4Tensor.empty(4, 64, torch.bfloat16, double=True)
    with pytest.raises(AssertionError, match=r"is not cast to torch\.float32"):
        weight.to(torch.float32)
    with pytest.raises(NotImplementedError):
        weight + 1


@given(
    data=st.binary(min_size=1, max_size=300),
    cuts=st.lists(st.integers(0, 300), max_size=4),
    place=st.integers(0, 299),
    bit=st.integers(0, 7),
)
@settings(max_examples=100, deadline=None)
def test_checksums_of_parts_add_up_and_see_one_bit(data, cuts, place, bit):
    whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    parts = [checksum(whole[a:b], a) for a, b in pairwise(edges)]
    total = checksum(whole, 0)
    assert torch.stack(parts).sum() == total
    damaged = whole.clone()
    damaged[place % len(data)] ^= 1 << bit
    assert checksum(damaged, 0) != total
