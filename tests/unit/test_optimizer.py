"""Moments of every optimizer come back bit for bit, and take the room that was made for them."""

import pytest
import torch
from torch import nn

from qlora_dist.errors import CheckpointError
from qlora_dist.spec import OptimizerSection
from qlora_dist.train.optimizer import (
    allocate_moments,
    make_optimizer,
    moment_bytes,
    moments,
    set_moments,
)
from qlora_dist.train.snapshot import Snapshot

KINDS = ["adamw", "paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit"]


def fresh():
    generator = torch.Generator().manual_seed(0)
    # One above and one below the size from which bitsandbytes quantises moments.
    sizes = {"large": (128, 96), "small": (16, 16)}
    return {k: nn.Parameter(torch.randn(s, generator=generator)) for k, s in sizes.items()}


def steps(optimizer, parameters, count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_an_optimizer_goes_on_from_its_saved_moments_bit_for_bit(kind):
    section = OptimizerSection(kind=kind, lr=1e-3)
    whole = fresh()
    optimizer = make_optimizer(section, whole)
    assert moments(optimizer, whole) == {}
    steps(optimizer, whole, 3, seed=1)
    saved = Snapshot().take(moments(optimizer, whole))
    weights = {name: parameter.detach().clone() for name, parameter in whole.items()}
    steps(optimizer, whole, 3, seed=2)

    resumed = {name: nn.Parameter(weight) for name, weight in weights.items()}
    again = make_optimizer(section, resumed)
    allocate_moments(again, 3)
    set_moments(moments(again, resumed), saved, saved.__getitem__)
    steps(again, resumed, 3, seed=2)
    for name, parameter in whole.items():
        assert torch.equal(parameter, resumed[name])
    ours, theirs = moments(optimizer, whole), moments(again, resumed)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for name, parameter in whole.items():
        size = sum(t.nbytes for key, t in ours.items() if key.startswith(f"{name}."))
        assert size == moment_bytes(section, parameter)


def test_moments_of_another_kind_are_refused():
    adamw, eight = (OptimizerSection(kind=kind) for kind in ("adamw", "adamw_8bit"))
    parameters = fresh()
    optimizer = make_optimizer(adamw, parameters)
    steps(optimizer, parameters, 1, seed=1)
    saved = Snapshot().take(moments(optimizer, parameters))
    other = fresh()
    again = make_optimizer(eight, other)
    allocate_moments(again, 1)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        set_moments(moments(again, other), saved, saved.__getitem__)


def test_a_snapshot_is_a_copy_and_grows():
    snapshot = Snapshot()
    tensor = torch.arange(6.0).view(2, 3)
    copy = snapshot.take({"a": tensor})["a"]
    tensor.zero_()
    assert copy.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    more = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.rand(100), "c": torch.tensor(1.0)}
    copies = snapshot.take(more)
    assert all(torch.equal(copies[name], more[name]) for name in more)
