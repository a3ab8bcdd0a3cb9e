"""How the model lies over the processes.

A strategy is a class with the methods of :class:`Strategy`, and one line in ``STRATEGIES``. What of
it is trained, and how gradients meet, is :mod:`qlora_dist.train.trained`.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from qlora_dist.sizes import cuts_trained
from qlora_dist.spec import LoraAdapter, RunSpec
from qlora_dist.train.fill import WHOLE, Share, Slot
from qlora_dist.train.load import DTYPES, put_whole
from qlora_dist.train.trained import Rows, Trained, Whole
from qlora_dist.train.world import World
from qlora_dist.train.zero import Zero


class Strategy(Protocol):
    """What a run needs of a strategy, in the order in which it is asked.

    Attributes:
        holders: The processes that hold one model together.
        share: Which of its rows this process holds.
    """

    holders: World
    share: Share

    def __init__(self, world: World, spec: RunSpec, accelerator: Any = None) -> None: ...

    def shard(self, base: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        """Arrange the base, whose weights are not there yet, and the trainable parameters in it."""
        ...

    def put(self, slot: Slot, rows: torch.Tensor) -> None:
        """Take this process's rows of a weight of the base."""
        ...

    def train(self, parameters: Mapping[str, nn.Parameter]) -> Trained:
        """Take charge of the trainable parameters, once all weights are there."""
        ...


class Single:
    """One process."""

    share = WHOLE

    def __init__(self, world: World, spec: RunSpec, accelerator: Any = None) -> None:
        assert world.size == 1
        self.holders = world

    def shard(self, base: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        """Nothing to arrange."""

    def put(self, slot: Slot, rows: torch.Tensor) -> None:
        """It is the whole weight."""
        put_whole(slot, rows)

    def train(self, parameters: Mapping[str, nn.Parameter]) -> Trained:
        """All of them are here."""
        return Whole(parameters, self.holders, self.holders)


class Replicated:
    """ddp: the whole model on every process; gradients are summed once a step.

    torch's DistributedDataParallel is left out: what it adds to this, overlapping the reduction
    with the last backward pass, would fix no order of sums, and it keeps a second copy of all
    gradients in its buckets.
    """

    share = WHOLE

    def __init__(self, world: World, spec: RunSpec, accelerator: Any = None) -> None:
        self._world, self.holders = world, world.alone()

    def shard(self, base: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        """Nothing to arrange."""

    def put(self, slot: Slot, rows: torch.Tensor) -> None:
        """It is the whole weight."""
        put_whole(slot, rows)

    def train(self, parameters: Mapping[str, nn.Parameter]) -> Trained:
        """Every process has all of them, and takes the same step."""
        return Whole(parameters, self._world, self.holders)


class Sharded:
    """fsdp: each process holds its rows of the base.

    FSDP2 gathers a decoder layer when it is needed, the next one meanwhile, and lets it go. An
    adapter's weights and gradients are whole on every process unless the plan has them cut: they
    are small beside what a gather of them at each micro-batch would cost, gradients are summed once
    a step in one order, and what is trained is bit for bit what ddp trains. Weights that are
    trained themselves are cut, and gathered in the dtype of the computation.
    """

    def __init__(self, world: World, spec: RunSpec, accelerator: Any = None) -> None:
        self._world = world
        self.holders, self._copies = self._divide(world)
        self.share = Share(self.holders.rank, self.holders.size)
        self._mesh = self.holders.mesh()
        self._rows = cuts_trained(spec)
        self._policy = MixedPrecisionPolicy()
        if not isinstance(spec.adapter, LoraAdapter) and spec.model.dtype == "bf16":
            self._policy = MixedPrecisionPolicy(
                param_dtype=DTYPES["bf16"], reduce_dtype=torch.float32, cast_forward_inputs=False
            )

    def _divide(self, world: World) -> tuple[World, World]:
        """The processes that hold one model, and those that have the same rows of others."""
        return world, world.alone()

    def shard(self, base: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        """Have FSDP2 cut every decoder layer, and the embedding and the head as one more."""
        ignored = set() if self._rows else set(parameters.values())
        for module in (*base.get_decoder().layers, base):
            fully_shard(module, mesh=self._mesh, mp_policy=self._policy, ignored_params=ignored)
            assert isinstance(module, FSDPModule)
            # Each process has divided its loss by the targets of the whole batch already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

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
        for module, name in slot.places:
            module._parameters[name] = slot.module._parameters[slot.name]

    def train(self, parameters: Mapping[str, nn.Parameter]) -> Trained:
        """Each process steps its rows, or its part of an adapter that all have."""
        if self._rows:
            return Rows(parameters, self.holders, self._copies, self.share)
        return Whole(parameters, self._world, self.holders)


class Hybrid(Sharded):
    """hsdp: each node holds a model, sharded over its processes as under fsdp.

    Weights are gathered inside a node alone. Between nodes gradients travel, once a step; FSDP2
    with a mesh of two dimensions would have them travel after every backward pass.
    """

    def _divide(self, world: World) -> tuple[World, World]:
        return world.within_node(), world.across_nodes()


STRATEGIES: dict[str, type[Strategy]] = {
    "single": Single,
    "ddp": Replicated,
    "fsdp": Sharded,
    "hsdp": Hybrid,
    "zero2": Zero,
    "zero3": Zero,
}
