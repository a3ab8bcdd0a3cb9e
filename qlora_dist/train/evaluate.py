"""The evaluation loss during training."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from qlora_dist import faults
from qlora_dist.data.tokens import Sample
from qlora_dist.train.batch import make_batch
from qlora_dist.train.objective import summed_loss
from qlora_dist.train.world import World


def evaluation_loss(
    model: Any,
    samples: Sequence[Sample],
    *,
    num_targets: int,
    world: World,
    micro_size: int,
    flat: bool,
    pad_id: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    check_stop: Callable[[], None],
) -> float:
    """Mean loss over the ``num_targets`` targets of ``samples``, in nats; the same on every rank.

    Raises:
        Preempted: From ``check_stop``, between two batches.
    """
    starts = range(0, len(samples), micro_size)
    rounds = math.ceil(len(starts) / world.size)
    losses: list[float] = []
    with evaluation_mode(model), torch.no_grad():
        for turn in range(rounds):
            check_stop()
            faults.reach("evaluation")
            index = turn * world.size + world.rank
            part = samples[index * micro_size : (index + 1) * micro_size]
            # A rank with nothing left to do goes along: a sharded model needs every rank.
            rows = [[sample] for sample in part or samples[:1]]
            batch = make_batch(rows, flat=flat, pad_id=pad_id, device=world.device)
            with autocast():
                loss = float(summed_loss(model, batch))
            losses.append(loss if part else 0.0)
    total = math.fsum(row[0] for row in world.gather([math.fsum(losses)]))
    return total / num_targets


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Switch dropout off and back on."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
