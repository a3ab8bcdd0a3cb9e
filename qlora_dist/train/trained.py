"""What is trained, as one process has it: what it steps, its gradients, and what it saves.

:class:`Whole`: every process has all of it, and gradients are summed once a step. :class:`Rows`:
FSDP2 has cut it, gathers it where it is used, and sums the gradients of each backward pass.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from qlora_dist.errors import QLoRAError
from qlora_dist.train.digest import tensors_sha256
from qlora_dist.train.fill import Share
from qlora_dist.train.world import World

# What torch's clip_grad_norm_ adds to a norm before it divides by it.
_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Held:
    """A trained weight as a process has it.

    Attributes:
        tensor: All of it, or neighbouring rows, maybe none.
        first: The first of these rows.
        shape: Of all of it.
    """

    tensor: torch.Tensor
    first: int
    shape: tuple[int, ...]


class Trained(Protocol):
    """What the loop, a save and a resume need of what is trained.

    Attributes:
        held: Weights by name, equal names on all processes.
        stepped: What this process's optimizer is for; its gradients are in ``.grad``.
        saved: Weights that this process writes into a checkpoint.
        saves_moments: Whether it writes the moments of what it steps.
    """

    held: Mapping[str, Held]
    stepped: Mapping[str, nn.Parameter]
    saved: Mapping[str, torch.Tensor]
    saves_moments: bool

    def check(self) -> None:
        """Compare the processes' weights before the first step.

        Raises:
            QLoRAError: They differ.
        """
        ...

    def zero(self) -> None:
        """Forget the last step's gradients."""
        ...

    def reduce(self) -> None:
        """Turn each process's gradients into those of the global batch."""
        ...

    def clip(self, max_norm: float) -> float:
        """Scale the gradients down to a norm; returns the norm before that."""
        ...

    def spread(self) -> None:
        """Give every process what the others' optimizers have made of the weights."""
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


class Whole:
    """All of it on every process, under single, ddp, and fsdp with an adapter.

    Args:
        parameters: Trainable parameters by name, in the order of the model.
        world: The processes.
        shares_moments: Each process steps a run of neighbours, about as many elements as each other
            has, and sends them on; else all step all.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], world: World, *, shares_moments: bool
    ) -> None:
        self._parameters, self._world = parameters, world
        self._parts: list[torch.Tensor] = []
        self.stepped: Mapping[str, nn.Parameter] = parameters
        if shares_moments:
            owners = _owners(parameters, world.size)
            self._parts = _neighbours(parameters, owners, world.size)
            self.stepped = {
                name: parameter
                for (name, parameter), owner in zip(parameters.items(), owners, strict=True)
                if owner == world.rank
            }
        self.held: Mapping[str, Held] = {
            name: Held(p, 0, tuple(p.shape)) for name, p in parameters.items()
        }
        self.saved: Mapping[str, torch.Tensor] = parameters if world.rank == 0 else {}
        self.saves_moments = shares_moments or world.rank == 0
        self._gradients = Gradients(parameters)

    def check(self) -> None:
        """Compare hashes of all weights.

        Raises:
            QLoRAError: They differ.
        """
        if self._world.size == 1:
            return
        mine = tensors_sha256(self._parameters)
        same = self._world.from_rank_0(mine) == mine
        if self._world.any(not same):
            raise QLoRAError("the processes begin with different trainable parameters")

    def zero(self) -> None:
        """Forget the last step's."""
        self._gradients.buffer.zero_()

    def reduce(self) -> None:
        """Sum over all processes; each has divided by the targets of the whole batch already."""
        self._world.sum_in_place(self._gradients.buffer)

    def clip(self, max_norm: float) -> float:
        """As torch does it."""
        return float(nn.utils.clip_grad_norm_(list(self._parameters.values()), max_norm))

    def spread(self) -> None:
        """Each process sends what it has stepped, unless all have stepped all."""
        self._world.share_parts(self._parts)


class Rows:
    """Each process has its rows, which FSDP2 gathers for a layer's passes.

    Optimizers, of whom bitsandbytes' know nothing of DTensors, see plain parameters that share the
    rows' memory.

    Args:
        parameters: Trainable parameters by name, cut along their first dimension by FSDP2.
        world: The processes.
        share: Which rows are this process's.
    """

    saves_moments = True

    def __init__(self, parameters: Mapping[str, nn.Parameter], world: World, share: Share) -> None:
        self._world = world
        local = {name: _local(parameter) for name, parameter in parameters.items()}
        self.held: Mapping[str, Held] = {
            name: Held(
                rows, share.rows(parameters[name].shape[0])[0], tuple(parameters[name].shape)
            )
            for name, rows in local.items()
        }
        # A short tensor may end before the last process's rows begin.
        self.stepped: Mapping[str, nn.Parameter] = {
            name: nn.Parameter(rows) for name, rows in local.items() if rows.numel()
        }
        self.saved: Mapping[str, torch.Tensor] = self.stepped
        self._gradients = Gradients(self.stepped)
        for name, rows in self.stepped.items():
            parameters[name].grad = _like(parameters[name], rows.grad)

    def check(self) -> None:
        """No weight is on two processes."""

    def zero(self) -> None:
        """Forget the last step's."""
        self._gradients.buffer.zero_()

    def reduce(self) -> None:
        """FSDP2 has done it, at the end of each layer's backward pass."""

    def clip(self, max_norm: float) -> float:
        """The squares of all processes' norms are added up exactly."""
        own = float(torch.linalg.vector_norm(self._gradients.buffer, dtype=torch.float32))
        norm = math.sqrt(math.fsum(row[0] for row in self._world.gather([own * own])))
        if norm + _NORM_EPS > max_norm:
            self._gradients.buffer.mul_(max_norm / (norm + _NORM_EPS))
        return norm

    def spread(self) -> None:
        """They are gathered where they are used."""


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
