"""How the trainable state lies over the processes, and how gradients meet.

A strategy is a class with the methods of :class:`Strategy`, and one line in ``STRATEGIES``.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from qlora_dist.errors import QLoRAError
from qlora_dist.train.digest import tensors_sha256
from qlora_dist.train.fill import WHOLE, Share, Slot
from qlora_dist.train.load import put_whole
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
    """What a run needs of a strategy, in the order in which it is asked.

    Attributes:
        share: Which rows of the base this process holds.
        saves_moments: Whether this process writes the moments that its optimizer has.
    """

    share: Share
    saves_moments: bool

    def shard(self, base: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        """Arrange the base, which has no weights yet; not the trainable parameters in it."""
        ...

    def put(self, slot: Slot, rows: torch.Tensor) -> None:
        """Take this process's rows of a weight of the base."""
        ...

    def owned(self, parameters: Mapping[str, nn.Parameter]) -> Mapping[str, nn.Parameter]:
        """The trainable parameters that this process's optimizer is for."""
        ...

    def prepare(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Check or arrange the trainable parameters before the first step."""
        ...

    def reduce(self, gradients: Gradients) -> None:
        """Turn each rank's gradients into those of the global batch."""
        ...

    def spread(self) -> None:
        """Give every process what the others' optimizers have made of the parameters."""
        ...


class Single:
    """One process."""

    share = WHOLE
    saves_moments = True

    def __init__(self, world: World) -> None:
        assert world.size == 1

    def shard(self, base: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        """Nothing to arrange."""

    def put(self, slot: Slot, rows: torch.Tensor) -> None:
        """It is the whole weight."""
        put_whole(slot, rows)

    def owned(self, parameters: Mapping[str, nn.Parameter]) -> Mapping[str, nn.Parameter]:
        """All of them."""
        return parameters

    def prepare(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Nothing to arrange."""

    def reduce(self, gradients: Gradients) -> None:
        """The rank's gradients are the batch's."""

    def spread(self) -> None:
        """There are no others."""


class Replicated:
    """ddp: the whole model on every process; gradients are summed once a step.

    torch's DistributedDataParallel is left out: what it adds to this, overlapping the reduction
    with the last backward pass, would fix no order of sums, and it keeps a second copy of all
    gradients in its buckets.
    """

    share = WHOLE

    def __init__(self, world: World) -> None:
        self._world = world
        self.saves_moments = world.rank == 0

    def shard(self, base: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        """Nothing to arrange."""

    def put(self, slot: Slot, rows: torch.Tensor) -> None:
        """It is the whole weight."""
        put_whole(slot, rows)

    def owned(self, parameters: Mapping[str, nn.Parameter]) -> Mapping[str, nn.Parameter]:
        """All of them: every process takes the same step."""
        return parameters

    def prepare(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Check that all processes begin with the same bytes.

        Raises:
            QLoRAError: They do not.
        """
        check_equal(parameters, self._world)

    def reduce(self, gradients: Gradients) -> None:
        """Sum over all processes; each has divided by the targets of the whole batch already."""
        self._world.sum_in_place(gradients.buffer)

    def spread(self) -> None:
        """The others have made the same."""


class Sharded:
    """fsdp: each process holds its rows of the base, and the moments of its part of the adapter.

    FSDP2 gathers a decoder layer when it is needed, the next one meanwhile, and lets it go. The
    adapter's weights and gradients are whole on every process: they are small beside what a
    gather of them at each micro-batch would cost, gradients are summed once a step in one order,
    and what is trained is bit for bit what ddp trains.
    """

    saves_moments = True

    def __init__(self, world: World) -> None:
        self._world = world
        self._mesh = world.mesh()
        self.share = Share(world.rank, world.size)
        self._parts: list[torch.Tensor] = []

    def shard(self, base: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        """Have FSDP2 cut every decoder layer, and the embedding and the head as one more."""
        ignored = set(parameters.values())
        for layer in base.get_decoder().layers:
            fully_shard(layer, mesh=self._mesh, ignored_params=ignored)
        fully_shard(base, mesh=self._mesh, ignored_params=ignored)

    def put(self, slot: Slot, rows: torch.Tensor) -> None:
        """Give FSDP2 this process's part."""
        old = slot.module._parameters[slot.name]
        assert old is not None
        part = DTensor.from_local(
            rows,
            self._mesh,
            [Shard(0)],
            run_check=False,
            shape=old.shape,
            stride=old.stride(),
        )
        # FSDP2 listens to this, and takes the new part for its own.
        slot.module.load_state_dict({slot.name: part}, strict=False, assign=True)

    def owned(self, parameters: Mapping[str, nn.Parameter]) -> Mapping[str, nn.Parameter]:
        """One run of neighbours, about as many elements as each other process has."""
        return dict(
            item
            for item, owner in zip(
                parameters.items(), _owners(parameters, self._world.size), strict=True
            )
            if owner == self._world.rank
        )

    def prepare(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put all parameters into one buffer, in which each process's are neighbours.

        Raises:
            QLoRAError: The processes begin with different bytes.
        """
        check_equal(parameters, self._world)
        tensors = list(parameters.values())
        buffer = torch.cat([p.detach().reshape(-1) for p in tensors])
        ends, offset = [0] * self._world.size, 0
        for parameter, owner in zip(tensors, _owners(parameters, self._world.size), strict=True):
            view = buffer[offset : offset + parameter.numel()]
            parameter.data = view.view_as(parameter)
            offset += parameter.numel()
            ends[owner] = offset
        starts = [0, *ends[:-1]]
        self._parts = [buffer[a : max(a, b)] for a, b in zip(starts, ends, strict=True)]

    def reduce(self, gradients: Gradients) -> None:
        """Sum over all processes, as ddp does."""
        self._world.sum_in_place(gradients.buffer)

    def spread(self) -> None:
        """Each process sends the parameters that it has stepped."""
        self._world.share_parts(self._parts)


def check_equal(parameters: Mapping[str, nn.Parameter], world: World) -> None:
    """Check that all processes have the same trainable parameters.

    Raises:
        QLoRAError: They do not.
    """
    mine = tensors_sha256(parameters)
    same = world.from_rank_0(mine) == mine
    if world.any(not same):
        raise QLoRAError("the processes begin with different trainable parameters")


def _owners(parameters: Mapping[str, nn.Parameter], size: int) -> list[int]:
    """The process whose optimizer each parameter is in: runs of about equal numbers of elements."""
    total, before, owners = sum(p.numel() for p in parameters.values()), 0, []
    for parameter in parameters.values():
        owners.append(before * size // total)
        before += parameter.numel()
    return owners


STRATEGIES: dict[str, type[Single] | type[Replicated] | type[Sharded]] = {
    "single": Single,
    "ddp": Replicated,
    "fsdp": Sharded,
}
