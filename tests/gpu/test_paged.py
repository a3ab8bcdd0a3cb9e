"""Paged moments live in managed memory on a GPU only; what is saved of them is what comes back."""

import pytest
import torch
from torch import nn

from qlora_dist.spec import OptimizerSection
from qlora_dist.train.optimizer import allocate_moments, make_optimizer, moments, set_moments
from qlora_dist.train.snapshot import Snapshot


def steps(optimizer, parameters, count, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    for _ in range(count):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator, device="cuda")
        optimizer.step()


@pytest.mark.gpu(1)
@pytest.mark.parametrize("kind", ["adamw", "paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit"])
def test_an_optimizer_goes_on_from_its_saved_moments_bit_for_bit(kind):
    section = OptimizerSection(kind=kind, lr=1e-3)

    def fresh():
        generator = torch.Generator("cuda").manual_seed(0)
        # One above and one below the size from which bitsandbytes pages (1e5 elements).
        return {
            "large": nn.Parameter(torch.randn(512, 512, generator=generator, device="cuda")),
            "small": nn.Parameter(torch.randn(16, 16, generator=generator, device="cuda")),
        }

    whole = fresh()
    optimizer = make_optimizer(section, whole)
    steps(optimizer, whole, 3, seed=1)
    saved = Snapshot().take(moments(optimizer, whole))
    weights = {name: parameter.detach().clone() for name, parameter in whole.items()}
    steps(optimizer, whole, 3, seed=2)

    resumed = {name: nn.Parameter(weight) for name, weight in weights.items()}
    again = make_optimizer(section, resumed)
    allocate_moments(again, 3)
    set_moments(moments(again, resumed), saved, saved.__getitem__)
    if kind.startswith("paged_"):
        assert getattr(again.state[resumed["large"]]["state1"], "is_paged", False)
        assert not getattr(again.state[resumed["small"]]["state1"], "is_paged", False)
    steps(again, resumed, 3, seed=2)
    for name, parameter in whole.items():
        assert torch.equal(parameter, resumed[name])
    ours, theirs = moments(optimizer, whole), moments(again, resumed)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
