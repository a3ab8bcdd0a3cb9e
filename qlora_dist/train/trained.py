"""What is trained, as one process has it: what it steps, its gradients, and what it saves.

:class:`Whole`: every process has all of it, and gradients are summed once a step. :class:`Rows`:
FSDP2 has cut it, gathers it where it is used, and sums the gradients of each backward pass. What
DeepSpeed has cut is in :mod:`qlora_dist.train.zero`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from qlora_dist.errors import QLoRAError
from qlora_dist.train.digest import tensors_sha256
from qlora_dist.train.fill import Share
from qlora_dist.train.optimizer import allocate_moments, moments
from qlora_dist.train.world import World

# What torch's clip_grad_norm_ adds to a norm before it divides by it.
_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Held:
    """A trained weight as a process has it.

    Attributes:
        tensor: Neighbouring elements, row by row: all of them, whole rows, or any, maybe none.
        start: The first of these elements.
        shape: Of all of it.
    """

    tensor: torch.Tensor
    start: int
    shape: tuple[int, ...]


class Trained(Protocol):
    """What the loop, a save and a resume need of what is trained.

    Attributes:
        held: Weights by name, equal names on all processes.
        stepped: What this process's optimizer is for.
        saved: Weights that this process writes into a checkpoint.
        saves_moments: Whether it writes the moments of what it steps.
    """

    held: Mapping[str, Held]
    stepped: Mapping[str, torch.Tensor]
    saved: Mapping[str, torch.Tensor]
    saves_moments: bool

    def begin(self, model: nn.Module, optimizer: Any) -> nn.Module:
        """Take the model, and an optimizer of what is stepped; returns what is to be called."""
        ...

    def moments(self) -> dict[str, torch.Tensor]:
        """The moments of what is stepped, not copies, as ``parameter.moment``.

        They are empty before the first step and before :meth:`allocate`.
        """
        ...

    def allocate(self, step: int) -> None:
        """Take the memory for moments, of which so many steps are behind."""
        ...

    def restored(self) -> None:
        """Make use of weights that were put into what is held."""
        ...

    def check(self) -> None:
        """Compare the processes' weights before the first step.

        Raises:
            QLoRAError: They differ.
        """
        ...

    def zero(self) -> None:
        """Forget the last step's gradients."""
        ...

    def rehearse(self, loss: torch.Tensor) -> None:
        """Make gradients, and forget them."""
        ...

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradients of a part of a batch; say so with the last one."""
        ...

    def step(self, lr: float, max_norm: float) -> float:
        """Step with the gradients of the global batch.

        Args:
            lr: Learning rate.
            max_norm: What the gradients are scaled down to.

        Returns:
            Their norm before that. Where it is no number, nothing may have been stepped.
        """
        ...


class Gradients:
    """The gradients of parameters in one flat buffer, in the order of the model.

    Backward passes add into it in place, and one collective reduces it, so that sums have one
    fixed order.

    Args:
        parameters: Trainable parameters, all of one dtype and device.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        tensors = list(parameters.values())
        assert len({(p.dtype, p.device) for p in tensors}) == 1
        size = sum(p.numel() for p in tensors)
        self.buffer = torch.zeros(size, dtype=tensors[0].dtype, device=tensors[0].device)
        offset = 0
        for parameter in tensors:
            view = self.buffer[offset : offset + parameter.numel()]
            parameter.grad = view.view_as(parameter)
            offset += parameter.numel()


class _Stepping(ABC):
    """A step with an optimizer of plain parameters, whose gradients lie in one buffer."""

    stepped: Mapping[str, torch.Tensor]
    _gradients: Gradients
    _optimizer: Any = None

    def begin(self, model: nn.Module, optimizer: Any) -> nn.Module:
        """The model has all that it needs."""
        self._optimizer = optimizer
        return model

    def moments(self) -> dict[str, torch.Tensor]:
        """As the optimizer has them."""
        return moments(self._optimizer, self.stepped)

    def allocate(self, step: int) -> None:
        """As the optimizer would."""
        allocate_moments(self._optimizer, step)

    def restored(self) -> None:  # noqa: B027 - whoever steps plain parameters has nothing to do
        """They are the parameters themselves."""

    def zero(self) -> None:
        """Forget the last step's."""
        self._gradients.buffer.zero_()

    def rehearse(self, loss: torch.Tensor) -> None:
        """Into the buffer, and away."""
        self.backward(loss, last=False)
        self.zero()

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Into the buffer."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float, max_norm: float) -> float:
        """Reduce, clip, step, and give every process what it needs of the others."""
        self.reduce()
        norm = self.clip(max_norm)
        if math.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self.spread()
        return norm

    @abstractmethod
    def reduce(self) -> None:
        """Turn each process's gradients into those of the global batch."""

    @abstractmethod
    def clip(self, max_norm: float) -> float:
        """Scale the gradients down to a norm; returns the norm before that."""

    @abstractmethod
    def spread(self) -> None:
        """Give every process what the others' optimizers have made of the weights."""


class Whole(_Stepping):
    """All of it on every process.

    Args:
        parameters: Trainable parameters by name, in the order of the model.
        world: The processes.
        holders: Those that hold one model together, and share out its moments: each steps a run of
            neighbours, about as many elements as each other has, and sends them on. One process
            alone steps all.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], world: World, holders: World
    ) -> None:
        self._parameters, self._world, self._holders = parameters, world, holders
        self._parts: list[torch.Tensor] = []
        self.stepped: Mapping[str, torch.Tensor] = parameters
        if holders.size > 1:
            owners = _owners(parameters, holders.size)
            self._parts = _neighbours(parameters, owners, holders.size)
            self.stepped = {
                name: parameter
                for (name, parameter), owner in zip(parameters.items(), owners, strict=True)
                if owner == holders.rank
            }
        self.held: Mapping[str, Held] = {
            name: Held(p, 0, tuple(p.shape)) for name, p in parameters.items()
        }
        self.saved: Mapping[str, torch.Tensor] = parameters if world.rank == 0 else {}
        self.saves_moments = holders.part == 0
        self._gradients = Gradients(parameters)

    def check(self) -> None:
        """Compare hashes of all weights.

        Raises:
            QLoRAError: They differ.
        """
        _check_equal(self._parameters, self._world)

    def reduce(self) -> None:
        """Sum over all processes; each has divided by the targets of the whole batch already."""
        self._world.sum_in_place(self._gradients.buffer)

    def clip(self, max_norm: float) -> float:
        """As torch does it."""
        return float(nn.utils.clip_grad_norm_(list(self._parameters.values()), max_norm))

    def spread(self) -> None:
        """Each process sends what it has stepped, unless it has stepped all."""
        self._holders.share_parts(self._parts)


class Rows(_Stepping):
    """Each process has its rows, which FSDP2 gathers for a layer's passes.

    Optimizers, of whom bitsandbytes' know nothing of DTensors, see plain parameters that share the
    rows' memory.

    Args:
        parameters: Trainable parameters by name, cut along their first dimension by FSDP2.
        holders: The processes that they are cut over.
        copies: Those that have the same rows, each in another such group.
        share: Which rows are this process's.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], holders: World, copies: World, share: Share
    ) -> None:
        self._holders, self._copies = holders, copies
        local = {name: _local(parameter) for name, parameter in parameters.items()}
        self.held: Mapping[str, Held] = {
            name: Held(rows, _start(share, parameters[name]), tuple(parameters[name].shape))
            for name, rows in local.items()
        }
        # A short tensor may end before the last process's rows begin.
        own = {name: nn.Parameter(rows) for name, rows in local.items() if rows.numel()}
        self.stepped: Mapping[str, torch.Tensor] = own
        self.saves_moments = holders.part == 0
        self.saved: Mapping[str, torch.Tensor] = self.stepped if self.saves_moments else {}
        self._gradients = Gradients(own)
        for name, rows in own.items():
            parameters[name].grad = _like(parameters[name], rows.grad)

    def check(self) -> None:
        """Compare hashes of this process's rows with those of the others that have them.

        Raises:
            QLoRAError: They differ.
        """
        _check_equal({name: held.tensor for name, held in self.held.items()}, self._copies)

    def reduce(self) -> None:
        """Sum over the copies; FSDP2 has done it within each, after each layer's backward pass."""
        self._copies.sum_in_place(self._gradients.buffer)

    def clip(self, max_norm: float) -> float:
        """The squares of all processes' norms are added up exactly."""
        own = float(torch.linalg.vector_norm(self._gradients.buffer, dtype=torch.float32))
        norm = math.sqrt(math.fsum(row[0] for row in self._holders.gather([own * own])))
        if norm + _NORM_EPS > max_norm:
            self._gradients.buffer.mul_(max_norm / (norm + _NORM_EPS))
        return norm

    def spread(self) -> None:
        """They are gathered where they are used."""


def _check_equal(tensors: Mapping[str, torch.Tensor], world: World) -> None:
    """Compare what all of a world's processes should have the same of."""
    if world.size == 1:
        return
    mine = tensors_sha256(tensors)
    same = world.from_rank_0(mine) == mine
    if world.any(not same):
        raise QLoRAError("the processes begin with different trainable parameters")


def _start(share: Share, parameter: nn.Parameter) -> int:
    """The first element of a process's rows."""
    return share.rows(parameter.shape[0])[0] * (parameter.numel() // parameter.shape[0])


def _local(parameter: nn.Parameter) -> torch.Tensor:
    assert isinstance(parameter, DTensor)
    rows: torch.Tensor = parameter._local_tensor
    return rows.detach()


def _like(parameter: nn.Parameter, rows: Any) -> DTensor:
    """A tensor that is cut as a parameter is, of these rows."""
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        rows,
        parameter.device_mesh,
        [Shard(0)],
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _neighbours(
    parameters: Mapping[str, nn.Parameter], owners: list[int], size: int
) -> list[torch.Tensor]:
    """Put all parameters into one buffer; each process's part of it."""
    tensors = list(parameters.values())
    buffer = torch.cat([p.detach().reshape(-1) for p in tensors])
    ends, offset = [0] * size, 0
    for parameter, owner in zip(tensors, owners, strict=True):
        view = buffer[offset : offset + parameter.numel()]
        parameter.data = view.view_as(parameter)
        offset += parameter.numel()
        ends[owner] = offset
    starts = [0, *ends[:-1]]
    return [buffer[a : max(a, b)] for a, b in zip(starts, ends, strict=True)]


def _owners(parameters: Mapping[str, nn.Parameter], size: int) -> list[int]:
    """The process whose optimizer each parameter is in: runs of about equal numbers of elements."""
    total, before, owners = sum(p.numel() for p in parameters.values()), 0, []
    for parameter in parameters.values():
        owners.append(before * size // total)
        before += parameter.numel()
    return owners
