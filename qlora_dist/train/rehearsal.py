"""The longest batch that is to come, tried before the first step: memory runs out now, or never."""

import torch

from qlora_dist.data.schedule import longest_micro_batch
from qlora_dist.errors import BadNodeError, PlanError
from qlora_dist.fitting import what_takes_less
from qlora_dist.memory import CONTEXT_BYTES, NCCL_BYTES
from qlora_dist.plan import attention_of
from qlora_dist.sizes import GIB
from qlora_dist.train.batch import make_batch
from qlora_dist.train.checkpoint import TrainState
from qlora_dist.train.generators import get_rng, set_rng
from qlora_dist.train.objective import summed_loss
from qlora_dist.train.optimizer import moment_bytes
from qlora_dist.train.trainer import Training

# Less than this nobody computes with.
_OTHERS_BYTES = 2 * GIB


def rehearse(t: Training, state: TrainState) -> None:
    """Run the longest batch forward and backward, and leave no trace of it; all ranks together.

    Args:
        t: A training that is ready to begin.
        state: Where it begins.

    Raises:
        PlanError: It does not fit.
    """
    assert t.length.steps is not None
    if state.step >= t.length.steps:
        return
    t.world.pulse.at("trying the longest batch", state.step)
    size = t.plan.spec.batch.global_size
    rows = longest_micro_batch(
        t.schedule,
        t.corpus.lengths,
        begin=state.position,
        end=state.position + (t.length.steps - state.step) * size,
        micro_size=t.plan.spec.batch.micro_size,
        padded=not t.flat,
        check=lambda: t.world.pulse.at("looking for the longest batch", state.step),
    )
    documents = [t.corpus.documents(row) for row in rows]
    batch = make_batch(documents, flat=t.flat, pad_id=t.pad_id, device=t.world.device)
    generators = get_rng(t.world.device)
    try:
        # They are made at the first step, and stay.
        moments = _room_for_moments(t) if state.step == 0 else None
        with t.autocast():
            loss = summed_loss(t.model, batch)
        t.trained.rehearse(loss)
    except torch.OutOfMemoryError as error:
        _blame_others(t.world.device)
        raise PlanError(_too_large(t, batch.input_ids.shape, error)) from error
    del moments, loss
    set_rng(generators, t.world.device)
    if t.world.device.type == "cuda":
        peak, planned = torch.cuda.max_memory_allocated(), t.plan.memory.peak_bytes
        t.say(
            f"memory: the longest batch, {_size(batch.input_ids.shape)}, takes {peak / GIB:.2f} "
            f"GiB; the plan for the longest that the limits allow says {planned / GIB:.2f} GiB"
        )


def _room_for_moments(t: Training) -> torch.Tensor | None:
    section = t.plan.spec.optimizer
    if section.kind.startswith("paged_"):
        return None
    size = sum(moment_bytes(section, parameter) for parameter in t.trained.stepped.values())
    return torch.empty(size, dtype=torch.uint8, device=t.world.device)


def _blame_others(device: torch.device) -> None:
    """Another machine may do better where somebody else holds this GPU's memory.

    Raises:
        BadNodeError: Somebody does.
    """
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device) - CONTEXT_BYTES - NCCL_BYTES
    if others > _OTHERS_BYTES:
        raise BadNodeError(
            f"{device}: memory runs out, and other processes hold {others / GIB:.1f} GiB of it "
            "(nvidia-smi shows them)"
        )


def _too_large(t: Training, shape: torch.Size, error: torch.OutOfMemoryError) -> str:
    spec, plan = t.plan.spec, t.plan
    ways = [
        " ".join(f"{key}={value}" for key, value in fit.changes.items())
        for fit in what_takes_less(spec, plan.shape, attention=attention_of(spec))
    ]
    advice = f"less is taken with {', or '.join(ways)}. " if ways else ""
    return (
        f"batch.micro_size: the longest batch, {_size(shape)}, does not fit beside the model, and "
        f"the plan counted {plan.memory.peak_bytes / GIB:.2f} GiB: {advice}{error}"
    )


def _size(shape: torch.Size) -> str:
    return f"{shape[0]} x {shape[1]:,} tokens"
