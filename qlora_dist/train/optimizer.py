"""AdamW, torch's or bitsandbytes', its learning rate, and its state by parameter name."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qlora_dist.errors import CheckpointError
from qlora_dist.plan import Length
from qlora_dist.spec import OptimizerSection, ScheduleSection

# The moments, as each library calls them. What else their state holds follows from the step.
_MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "paged_adamw_32bit": ("state1", "state2")}


def make_optimizer(section: OptimizerSection, parameters: Mapping[str, nn.Parameter]) -> Any:
    """The optimizer that a spec names, over parameters that are on their device."""
    tensors = list(parameters.values())
    common: dict[str, Any] = {
        "lr": section.lr,
        "betas": (section.beta1, section.beta2),
        "eps": section.eps,
        "weight_decay": section.weight_decay,
    }
    if section.kind == "adamw":
        return torch.optim.AdamW(tensors, fused=tensors[0].device.type == "cuda", **common)
    from bitsandbytes.optim import PagedAdamW32bit

    return PagedAdamW32bit(tensors, **common)


def get_moments(
    section: OptimizerSection, optimizer: Any, parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Copies on the CPU of all moments, as ``parameter.moment``; empty before the first step."""
    if section.kind == "paged_adamw_32bit":
        _finish(parameters)
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment].detach().to("cpu", copy=True)
        for name, parameter in parameters.items()
        for moment in _MOMENTS[section.kind]
        if optimizer.state[parameter]
    }


def set_moments(
    section: OptimizerSection,
    optimizer: Any,
    parameters: Mapping[str, nn.Parameter],
    moments: Mapping[str, torch.Tensor],
    *,
    step: int,
) -> None:
    """Put back what :func:`get_moments` gave after ``step`` steps.

    Raises:
        CheckpointError: Not every moment is there, or there are others.
    """
    names = _MOMENTS[section.kind]
    wanted = {f"{name}.{moment}" for name in parameters for moment in names} if step else set()
    if wanted != set(moments):
        odd = sorted(wanted ^ set(moments))
        raise CheckpointError(f"the optimizer's state does not fit the model: {', '.join(odd[:3])}")
    if not step:
        return
    for index, (name, parameter) in enumerate(parameters.items()):
        _allocate(section, optimizer, index, parameter, step)
        for moment in names:
            optimizer.state[parameter][moment].copy_(moments[f"{name}.{moment}"])
    _finish(parameters)


def _allocate(
    section: OptimizerSection, optimizer: Any, index: int, parameter: nn.Parameter, step: int
) -> None:
    """Give a parameter's moments memory of the kind that the optimizer itself would take."""
    if section.kind == "paged_adamw_32bit":
        if not optimizer.initialized:
            optimizer.check_overrides()
            optimizer.to_gpu()
            optimizer.initialized = True
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
        optimizer.state[parameter]["step"] = step
        return
    # torch keeps the step on the device for its fused kernel, and on the CPU otherwise.
    fused = parameter.device.type == "cuda"
    optimizer.state[parameter] = {
        "step": torch.tensor(float(step), device=parameter.device if fused else "cpu"),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def _finish(parameters: Mapping[str, nn.Parameter]) -> None:
    """Paged moments are host-visible memory that kernels still write to: wait for those."""
    if any(parameter.device.type == "cuda" for parameter in parameters.values()):
        torch.cuda.synchronize()


def learning_rate(step: int, schedule: ScheduleSection, length: Length, *, peak: float) -> float:
    """Learning rate of a step, the first being 0, as transformers' schedulers have it.

    Warm-up rises in a line from 0 (a step of rate 0 included, as there); then constant, or down to
    0 in a line or in half a cosine.
    """
    assert length.steps is not None
    assert length.warmup_steps is not None
    if step < length.warmup_steps:
        return peak * step / max(1, length.warmup_steps)
    if schedule.kind == "constant":
        return peak
    done = (step - length.warmup_steps) / max(1, length.steps - length.warmup_steps)
    if schedule.kind == "linear":
        return peak * max(0.0, 1.0 - done)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
