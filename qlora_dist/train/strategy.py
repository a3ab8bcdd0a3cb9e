"""How the trainable state lies over the processes, and how gradients meet.

A strategy is a class with the methods of :class:`Strategy`, and one line in ``STRATEGIES``.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from qlora_dist.errors import QLoRAError
from qlora_dist.train.digest import tensors_sha256
from qlora_dist.train.world import World


class Gradients:
    """The gradients of all trainable parameters in one flat buffer, in the order of the model.

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

    def zero(self) -> None:
        """Forget the last step's."""
        self.buffer.zero_()


class Strategy(Protocol):
    """What ``fit`` needs of a strategy."""

    def prepare(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Check or arrange the trainable parameters before the first step."""
        ...

    def reduce(self, gradients: Gradients) -> None:
        """Turn each rank's gradients into those of the global batch."""
        ...


class Single:
    """One process."""

    def __init__(self, world: World) -> None:
        assert world.size == 1

    def prepare(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Nothing to arrange."""

    def reduce(self, gradients: Gradients) -> None:
        """The rank's gradients are the batch's."""


class Replicated:
    """ddp: the whole model on every process; gradients are summed once a step.

    torch's DistributedDataParallel is left out: what it adds to this, overlapping the reduction
    with the last backward pass, would fix no order of sums, and it keeps a second copy of all
    gradients in its buckets.
    """

    def __init__(self, world: World) -> None:
        self._world = world

    def prepare(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Check that all processes begin with the same bytes.

        Raises:
            QLoRAError: They do not.
        """
        mine = tensors_sha256(parameters)
        same = self._world.from_rank_0(mine) == mine
        if self._world.any(not same):
            raise QLoRAError("ddp: the processes begin with different trainable parameters")

    def reduce(self, gradients: Gradients) -> None:
        """Sum over all processes; each has divided by the targets of the whole batch already."""
        self._world.sum_in_place(gradients.buffer)


STRATEGIES: dict[str, type[Single] | type[Replicated]] = {"single": Single, "ddp": Replicated}
