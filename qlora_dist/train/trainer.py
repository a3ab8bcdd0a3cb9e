"""The training loop."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qlora_dist import faults
from qlora_dist.data.corpus import Corpus
from qlora_dist.data.schedule import SampleSchedule, shard
from qlora_dist.errors import DivergedError
from qlora_dist.plan import Length, Plan
from qlora_dist.train.batch import make_batch
from qlora_dist.train.checkpoint import TrainState
from qlora_dist.train.evaluate import evaluation_loss
from qlora_dist.train.generators import get_rng, set_rng
from qlora_dist.train.log import Metrics
from qlora_dist.train.objective import summed_loss
from qlora_dist.train.optimizer import learning_rate
from qlora_dist.train.preempt import Preempted
from qlora_dist.train.saver import Saver
from qlora_dist.train.trained import Trained
from qlora_dist.train.world import World


@dataclass
class Training:
    """Everything that a loop works on; made by the worker, in the order of these lines.

    Attributes:
        length: Steps and warm-up, now that the samples are counted.
        check_stop: Agrees with the other ranks on whether to go on, and raises Preempted if not;
            all ranks call it together.
        flat: Batches are one row of samples, for an attention kernel that is told their bounds.
        model: Base, maybe with an adapter, on its device.
        trained: What of it is trained.
        autocast: Gives the context that forward passes run in.
        track: Takes a dict of numbers and a step for the curves.
        step: Steps that are complete, for whoever has to say where the run ended.
    """

    plan: Plan
    length: Length
    world: World
    check_stop: Callable[[], None]
    corpus: Corpus
    flat: bool
    pad_id: int
    schedule: SampleSchedule
    model: Any
    trained: Trained
    autocast: Callable[[], AbstractContextManager[Any]]
    saver: Saver
    metrics: Metrics
    track: Callable[[dict[str, float], int], None]
    say: Callable[[str], None]
    step: int = 0


def fit(t: Training, state: TrainState) -> TrainState:
    """Train from ``state`` to the last step.

    Every pass of the loop stands between two steps: evaluate there if that is due, save if that is
    due, then take the next step. A resumed run enters at the same place.

    Returns:
        The last state, which is committed.

    Raises:
        Preempted: A stop was asked for; the last complete step is committed.
        DivergedError: Loss or gradient is not finite; nothing after the last checkpoint is kept.
        CheckpointError: The last checkpoint could not be written.
    """
    assert t.length.steps is not None
    try:
        while True:
            t.step = state.step
            t.saver.poll()
            last = state.step >= t.length.steps
            improved = False
            if _evaluation_due(t, state, last=last):
                state = _evaluate(t, state)
                improved = state.best_step == state.step
            if last:
                t.world.pulse.at("saving", state.step)
                t.saver.finish(state)
                return state
            if t.saver.due(state, improved=improved):
                t.world.pulse.at("saving", state.step)
                t.saver.start(state)
            state = _train_step(t, state)
    except Preempted:
        if state.step > 0:
            t.world.pulse.at("saving", state.step)
            t.saver.finish(state)
        raise


def _train_step(t: Training, state: TrainState) -> TrainState:
    """One optimizer step on the next global batch; dropped whole if a stop comes inside."""
    t.world.pulse.at("training", state.step)
    faults.reach("first-step")
    spec, begin = t.plan.spec, time.perf_counter()
    samples = t.schedule.samples(state.position, spec.batch.global_size)
    total_targets = int(t.corpus.targets[samples].sum())
    total_tokens = int(t.corpus.lengths[samples].sum())
    mine = shard(
        samples, rank=t.world.rank, world_size=t.world.size, micro_size=spec.batch.micro_size
    )
    lr = learning_rate(state.step, spec.schedule, t.length, peak=spec.optimizer.lr)
    loss = _accumulate(t, mine, total_targets)
    t.world.pulse.took(micro_s=(time.perf_counter() - begin) / len(mine))
    limit = spec.optimizer.max_grad_norm
    grad_norm = t.trained.step(lr, math.inf if limit is None else limit)
    mean_loss = math.fsum(row[0] for row in t.world.gather([loss.item()]))
    if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
        raise DivergedError(
            f"step {state.step + 1}: loss {mean_loss}, gradient norm {grad_norm}, on samples "
            f"{samples.tolist()}; the last checkpoint is from before. Try a lower optimizer.lr"
        )
    before = state.position
    state = replace(
        state,
        step=state.step + 1,
        position=state.position + len(samples),
        tokens=state.tokens + total_tokens,
    )
    _report(
        t, state, mean_loss, lr, grad_norm, samples.tolist(), total_tokens, total_targets, begin
    )
    if state.position // t.corpus.num_sequences > before // t.corpus.num_sequences:
        faults.reach("epoch-end")
    return state


def _accumulate(t: Training, rows: npt.NDArray[np.int64], total_targets: int) -> torch.Tensor:
    """Forward and backward passes of this rank's part of a global batch.

    Args:
        t: The training.
        rows: Sample indices of shape ``(accumulation, micro_size)``.
        total_targets: Target tokens of the global batch, over all ranks.

    Returns:
        This rank's part of the batch's mean loss, a float32 scalar on the device.
    """
    # A step that a stop interrupts never was: its dropout will be drawn again.
    generators = get_rng(t.world.device)
    t.trained.zero()
    loss = torch.zeros((), device=t.world.device)
    for number, micro in enumerate(rows):
        try:
            t.check_stop()
        except Preempted:
            set_rng(generators, t.world.device)
            raise
        t.world.pulse.at("training")
        batch = make_batch(
            [t.corpus.documents(i) for i in micro],
            flat=t.flat,
            pad_id=t.pad_id,
            device=t.world.device,
        )
        with t.autocast():
            part = summed_loss(t.model, batch) / total_targets
        t.trained.backward(part, last=number == len(rows) - 1)
        loss += part.detach()
        faults.reach("accumulation")
    return loss


def _report(
    t: Training,
    state: TrainState,
    loss: float,
    lr: float,
    grad_norm: float,
    samples: list[int],
    tokens: int,
    targets: int,
    begin: float,
) -> None:
    cuda = t.world.device.type == "cuda"
    seconds = time.perf_counter() - begin
    curves = {
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens_per_s": tokens / seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
    }
    t.metrics.write(
        "train",
        step=state.step,
        num_steps=t.length.steps,
        **curves,
        tokens=tokens,
        target_tokens=targets,
        step_s=seconds,
        position=state.position,
        samples=samples,
    )
    t.track(curves, state.step)


def _evaluation_due(t: Training, state: TrainState, *, last: bool) -> bool:
    if not t.corpus.validation or state.evaluated_step == state.step:
        return False
    every = t.plan.spec.evaluation.every_steps
    return state.step == 0 or last or (every is not None and state.step % every == 0)


def _evaluate(t: Training, state: TrainState) -> TrainState:
    t.world.pulse.at("evaluation", state.step)
    loss = evaluation_loss(
        t.model,
        t.corpus.validation,
        num_targets=t.corpus.num_validation_targets,
        world=t.world,
        micro_size=t.plan.spec.evaluation.micro_size,
        flat=t.flat,
        pad_id=t.pad_id,
        autocast=t.autocast,
        check_stop=t.check_stop,
    )
    t.metrics.write("eval", step=state.step, loss=loss, rows=len(t.corpus.validation))
    t.track({"eval_loss": loss}, state.step)
    t.say(f"step {state.step}: held-out loss {loss:.4f}")
    state = replace(state, evaluated_step=state.step)
    # Step 0 is the base's own loss, which has no checkpoint to keep.
    best = math.inf if state.best_loss is None else state.best_loss
    if state.step > 0 and loss < best:
        state = replace(state, best_step=state.step, best_loss=loss)
    return state
