"""AdamW, torch's or bitsandbytes', its learning rate, and its state by parameter name."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from qlora_dist.errors import CheckpointError
from qlora_dist.plan import Length
from qlora_dist.sizes import OPTIMIZER_BLOCK
from qlora_dist.spec import OptimizerSection, ScheduleSection

# What of each library's state is saved; the rest follows from the step, or is a constant. The 8-bit
# kinds keep the moments of parameters of fewer elements in 32 bits, without absmax.
_MIN_8BIT_SIZE = 4096
_TORCH = ("exp_avg", "exp_avg_sq")
_BITSANDBYTES = ("state1", "state2", "absmax1", "absmax2")


def make_optimizer(
    section: OptimizerSection,
    parameters: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Any:
    """The optimizer that a spec names, over parameters that are on their device.

    Norms and biases do not decay, as in transformers' Trainer.

    Args:
        section: Names it.
        parameters: What it steps.
        shapes: Of the whole weights, where the parameters do not tell.
    """
    tensors = list(parameters.values())
    whole = shapes or {name: tuple(p.shape) for name, p in parameters.items()}
    matrices = [p for name, p in parameters.items() if len(whole[name]) > 1]
    vectors = [p for name, p in parameters.items() if len(whole[name]) <= 1]
    groups = [
        {"params": matrices, "weight_decay": section.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    common: dict[str, Any] = {
        "lr": section.lr,
        "betas": (section.beta1, section.beta2),
        "eps": section.eps,
    }
    if section.kind == "adamw":
        return torch.optim.AdamW(groups, fused=tensors[0].device.type == "cuda", **common)
    from bitsandbytes import optim

    kinds = {
        "paged_adamw_32bit": optim.PagedAdamW32bit,
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
    }
    return kinds[section.kind](groups, **common)


def moments(optimizer: Any, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The moments themselves, not copies, as ``parameter.moment``; empty before the first step."""
    return {
        f"{name}.{moment}": tensor
        for name, parameter in parameters.items()
        for moment, tensor in state_tensors(optimizer, parameter)
    }


def moment_bytes(section: OptimizerSection, parameter: torch.Tensor) -> int:
    """Bytes that a parameter's moments will take, once the optimizer has made them."""
    if section.kind == "adamw":
        return 2 * parameter.nbytes
    if section.kind == "paged_adamw_32bit" or parameter.numel() < _MIN_8BIT_SIZE:
        return 8 * parameter.numel()
    return 2 * parameter.numel() + 2 * 4 * math.ceil(parameter.numel() / OPTIMIZER_BLOCK)


def set_moments(
    own: Mapping[str, torch.Tensor], names: Collection[str], read: Callable[[str], torch.Tensor]
) -> None:
    """Put back what :func:`moments` gave.

    Args:
        own: What it gives of a fresh optimizer, with memory that :func:`allocate_moments` took.
        names: Those that were saved.
        read: Gives one of them, of the same shape.

    Raises:
        CheckpointError: Not every moment is there, or there are others.
    """
    if odd := sorted(own.keys() ^ set(names)):
        raise CheckpointError(f"the optimizer's state does not fit the model: {', '.join(odd[:3])}")
    for name, tensor in own.items():
        saved = read(name)
        if tensor.shape != saved.shape or tensor.dtype != saved.dtype:
            raise CheckpointError(f"the optimizer's state does not fit the model: {name}")
        tensor.copy_(saved)
    if any(tensor.device.type == "cuda" for tensor in own.values()):
        torch.cuda.synchronize()


def state_tensors(optimizer: Any, parameter: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Names and moments of one parameter.

    Paged moments lie in managed memory, which bitsandbytes shows as CPU tensors. Here they are seen
    through the GPU: a copy of them is then one in device order, wherever their pages are.
    """
    state = optimizer.state[parameter]
    names = [name for name in (*_TORCH, *_BITSANDBYTES) if name in state]
    return [(name, _on_device(state[name], parameter.device)) for name in names]


def _on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if not getattr(tensor, "is_paged", False):
        return tensor
    return torch.as_tensor(_Managed(tensor), device=device)


class _Managed:
    """Managed memory, as the CUDA array interface describes it (version 3)."""

    def __init__(self, tensor: torch.Tensor) -> None:
        kind = {torch.float32: "<f4", torch.uint8: "|u1"}[tensor.dtype]
        self._memory = tensor
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": kind,
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def allocate_moments(optimizer: Any, step: int) -> None:
    """Give the moments of a fresh optimizer memory of the kind that it would take itself.

    Args:
        optimizer: One of :func:`make_optimizer`.
        step: Steps that are behind it.
    """
    for group, members in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(members["params"]):
            allocate(optimizer, (group, index), parameter, step)


def allocate(optimizer: Any, place: tuple[int, int], parameter: torch.Tensor, step: int) -> None:
    """The same for one parameter: number of its group, and its own in that."""
    if not isinstance(optimizer, torch.optim.AdamW):
        if not optimizer.initialized:
            optimizer.check_overrides()
            optimizer.to_gpu()
            optimizer.initialized = True
        optimizer.init_state(optimizer.param_groups[place[0]], parameter, *place)
        optimizer.state[parameter]["step"] = step
        return
    # torch keeps the step on the device for its fused kernel, and on the CPU otherwise.
    fused = parameter.device.type == "cuda"
    optimizer.state[parameter] = {
        "step": torch.tensor(float(step), device=parameter.device if fused else "cpu"),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


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
