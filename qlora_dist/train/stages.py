"""Training from a run directory to an adapter, stage by stage; each is a module of its own."""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora_dist import checkpoints, faults
from qlora_dist.attempt import note, own
from qlora_dist.checkpoints import Checkpoint
from qlora_dist.code_tree import other_code, running_sha256
from qlora_dist.data.build import ensure_store
from qlora_dist.data.corpus import Corpus
from qlora_dist.data.schedule import corpus_facts, make_schedule
from qlora_dist.data.store import Store, open_store
from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.engine_config import check_files, deepspeed_config
from qlora_dist.errors import CheckpointError, PlanError, QLoRAError, RunDirError
from qlora_dist.files import SEEN_WITHIN_S, wait_for
from qlora_dist.layout import RunDir, corpora_dir, open_run
from qlora_dist.plan import Length, Plan, attention_of, make_plan, plan_length
from qlora_dist.spec import LoraAdapter, RunSpec
from qlora_dist.train.adapters import trainable
from qlora_dist.train.attention import VARLEN
from qlora_dist.train.checkpoint import Part, TrainState, restore
from qlora_dist.train.consolidate import consolidate, consolidated_at, result_dir, result_name
from qlora_dist.train.generators import seed_rng
from qlora_dist.train.gpu_check import check_gpu
from qlora_dist.train.load import check_shape, empty_base, linear_layers
from qlora_dist.train.log import EverySoOften, Metrics, RunLog
from qlora_dist.train.method import dtype_of_weights, make_trainable
from qlora_dist.train.optimizer import make_optimizer
from qlora_dist.train.place import Place
from qlora_dist.train.preempt import Preempted, StopRequest
from qlora_dist.train.pulse import Pulse
from qlora_dist.train.rehearsal import rehearse
from qlora_dist.train.saver import Saver
from qlora_dist.train.stopwatch import Stopwatch
from qlora_dist.train.strategy import STRATEGIES
from qlora_dist.train.trainer import Training, fit
from qlora_dist.train.weights import load_weights
from qlora_dist.train.world import World


@dataclass
class Progress:
    """How far a process has come, for whoever must say how it ended."""

    attempt: int | None
    step: int = 0


def train(
    run: RunDir,
    place: Place,
    stop: StopRequest,
    progress: Progress,
    clock: Stopwatch,
    pulse: Pulse,
) -> None:
    """Take a run to its end.

    Raises:
        Preempted: A stop was asked for, and every complete step is committed.
        QLoRAError: See qlora_dist.errors.
    """
    run, spec = open_run(run.root)
    plan = make_plan(spec)
    if plan.not_runnable:
        raise PlanError("\n".join(plan.not_runnable))
    check_files(run.root, plan)
    pulse.every_s = min(pulse.every_s, spec.resources.timeout_s / 5)
    pulse.at("joining the other processes")
    world = World.start(place, plan.topology, timeout_s=spec.resources.timeout_s, pulse=pulse)
    check_gpu(plan, world.device)
    world.check_sum()
    clock.lap("process group")
    with _attempt(run, place, world) as progress.attempt:
        _train(run, plan, place, world, stop, progress, clock)
    world.stop()


def _train(
    run: RunDir,
    plan: Plan,
    place: Place,
    world: World,
    stop: StopRequest,
    progress: Progress,
    clock: Stopwatch,
) -> None:
    spec, echo = plan.spec, place.attempt is None
    assert progress.attempt is not None
    log = RunLog(run, progress.attempt, world, echo=echo)
    if echo and world.rank == 0 and (line := other_code(run)) is not None:
        log.say(line)
        note(run, progress.attempt, code=running_sha256())

    def check_stop() -> None:
        if world.any(stop.here()):
            raise Preempted

    _prepare_process(plan, world)
    world.pulse.at("choosing a checkpoint")
    checkpoint = _resume_point(run, world, log)
    progress.step = checkpoint.step if checkpoint else 0
    world.pulse.at("data")
    corpus = Corpus(_open_store(run, spec, world, stop, log), spec.evaluation.max_rows)
    length = plan_length(spec, corpus.num_sequences)
    _say_data(log, spec, corpus, length)
    clock.lap("data")
    check_stop()

    world.pulse.at("loading the model")
    faults.reach("load")
    attention = attention_of(spec)
    accelerator = _accelerator(run, plan, world)
    strategy = STRATEGIES[spec.strategy.kind](world, spec, accelerator)
    base = empty_base(spec, attention=attention, share=strategy.share, dtype=dtype_of_weights(spec))
    check_shape(base.model, plan)
    layers = len(linear_layers(base.model))
    model, targets = make_trainable(base.model, spec, device=world.device)
    _say_model(log, plan, targets, trainable(model), layers)
    strategy.shard(base.model, trainable(model))
    load_weights(base, spec, world, strategy, stop, check_stop, log, place.local_dir)
    clock.lap("model")

    trained = strategy.train(trainable(model))
    shapes = {name: held.shape for name, held in trained.held.items()}
    model = trained.begin(model, make_optimizer(spec.optimizer, trained.stepped, shapes))
    part = Part(
        run=run,
        attempt=progress.attempt,
        spec=spec,
        world=world,
        trained=trained,
        target_modules=targets,
        corpus_sha256=corpus.store.sha256,
        say=log.say,
    )
    state = TrainState()
    if checkpoint is not None:
        state = restore(part, checkpoint)
        log.say(f"resumed after step {state.step} from {checkpoint.path.name}")
    _check_steps(length, state)
    trained.check()
    metrics = Metrics(run.metrics, world, progress.attempt)
    metrics.cut(state.metrics_bytes)
    saver = Saver(part, metrics, state)
    saver.prepare()
    track, finish_tracking = _trackers(run, spec, accelerator, state)

    training = Training(
        plan=plan,
        length=length,
        world=world,
        check_stop=check_stop,
        corpus=corpus,
        flat=attention == VARLEN,
        pad_id=corpus.store.facts["pad_id"],
        schedule=make_schedule(spec, corpus),
        model=model,
        trained=trained,
        autocast=_autocast(spec, world),
        saver=saver,
        metrics=metrics,
        track=track,
        say=log.say,
    )
    training.step = state.step
    clock.lap("the rest")
    try:
        rehearse(training, state)
        clock.lap("the longest batch")
        log.say(f"ready after {clock}")
        end = fit(training, state)
    finally:
        progress.step = training.step
        saver.close()
        finish_tracking()
    _write_result(run, spec, world, stop, log, end)


def _write_result(
    run: RunDir, spec: RunSpec, world: World, stop: StopRequest, log: RunLog, end: TrainState
) -> None:
    """The adapter or the model, of the last checkpoint.

    A run that was finished already keeps what it has, which may be of a chosen checkpoint.
    """

    def work(check: Callable[[], None]) -> None:
        if consolidated_at(run, spec) != end.step:
            consolidate(run, spec, on_tensor=check)
            log.say(f"{result_name(spec)} written to {result_dir(run, spec)}")

    world.pulse.at(f"writing the {result_name(spec)}")
    world.on_rank_0("result", work, stop.here)


@contextmanager
def _attempt(run: RunDir, place: Place, world: World) -> Iterator[int]:
    """The attempt's number: the launcher's, or, under another launcher, one that rank 0 begins."""
    if place.attempt is not None:
        yield place.attempt
    elif world.rank == 0:
        with contextlib.ExitStack() as stack:
            try:
                number = stack.enter_context(own(run))
            except RunDirError as error:
                world.from_rank_0(str(error))
                raise
            world.from_rank_0(number)
            yield number
    else:
        told = world.from_rank_0(None)
        if isinstance(told, str):
            raise RunDirError(told)
        yield told


def _prepare_process(plan: Plan, world: World) -> None:
    """Set threads and generators.

    Each rank draws dropout of its own; the adapter's start and the order of the data use none of
    these generators.
    """
    if plan.topology.device == "cpu":
        cores = len(os.sched_getaffinity(0)) // plan.topology.processes_per_node
        torch.set_num_threads(plan.spec.resources.cpus_per_process or max(1, cores))
    if plan.spec.deterministic:
        torch.use_deterministic_algorithms(True)
        # Filling fresh memory guards against reading it unwritten; it costs a kernel a tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    seed_rng(plan.spec.seed, world.rank)


def _resume_point(run: RunDir, world: World, log: RunLog) -> Checkpoint | None:
    """The newest valid checkpoint, chosen by rank 0 and told to all."""
    told: dict[str, str] = {}
    if world.rank == 0:
        try:
            found, set_aside = checkpoints.newest_valid(run.checkpoints)
            for line in set_aside:
                log.say(line)
            told = {"path": str(found.path)} if found else {}
        except CheckpointError as error:
            told = {"error": str(error)}
    told = world.from_rank_0(told)
    if "error" in told:
        raise CheckpointError(told["error"])
    if "path" not in told:
        return None
    # Rank 0 has read every byte; the others need the manifest only.
    wait_for(Path(told["path"]), SEEN_WITHIN_S)
    return checkpoints.read_manifest(told["path"])


def _open_store(run: RunDir, spec: RunSpec, world: World, stop: StopRequest, log: RunLog) -> Store:
    """The tokenised corpus: made by rank 0 if it is not there, then opened by all."""
    folder = corpora_dir(spec, run.root)

    def work(check: Callable[[], None]) -> str:
        progress = EverySoOften(log.say)

        def on_rows(done: int, total: int) -> None:
            check()
            faults.reach("tokenising")
            progress.say(f"data: {done:,} of {total:,} rows tokenised")

        check()
        try:
            store = ensure_store(
                spec, load_tokenizer(spec), folder, on_rows=on_rows, on_chunk=check, say=log.say
            )
        except OSError as error:
            raise QLoRAError(checkpoints.storage_message(error, folder)) from error
        return store.path.name

    path = folder / world.on_rank_0("data", work, stop.here)
    wait_for(path, SEEN_WITHIN_S)
    return open_store(path, verify=False)


def _check_steps(length: Length, state: TrainState) -> None:
    """A run may be made longer or shorter at a resume, and not shorter than it is already."""
    assert length.steps is not None
    if state.step > length.steps:
        raise PlanError(
            f"schedule: {length.steps} steps, and the run has {state.step} behind it; use at least "
            "as many"
        )


def _say_data(log: RunLog, spec: RunSpec, corpus: Corpus, length: Length) -> None:
    facts, store = corpus_facts(spec, corpus), corpus.store
    log.say(
        f"data: {facts.num_samples:,} samples to train on, {len(corpus.validation):,} held out, "
        f"{facts.num_tokens:,} tokens, {facts.num_tokens / facts.num_samples:.0f} a sample"
    )
    if spec.data.packing:
        fill = facts.num_tokens / facts.num_sequences / store.facts["sequence_tokens"]
        log.say(f"data: packed into {facts.num_sequences:,} sequences, {fill:.1%} full")
    log.say(f"data: {facts.useful:.1%} of each batch is useful, the rest padding")
    for reason, count in store.facts["dropped"].items():
        log.say(f"data: {count:,} left out: {reason}")
    log.say(f"length: {length.steps:,} steps, {length.epochs:.2f} epochs")


def _say_model(
    log: RunLog, plan: Plan, targets: list[str], parameters: Any, num_layers: int
) -> None:
    count, adapter = sum(p.numel() for p in parameters.values()), plan.spec.adapter
    if count != plan.num_trained_params:
        raise QLoRAError(
            f"adapter: {count:,} trainable parameters, and the plan counted "
            f"{plan.num_trained_params:,}"
        )
    if not isinstance(adapter, LoraAdapter):
        log.say(f"full fine-tuning: all {count:,} parameters, in {adapter.dtype}")
        return
    log.say(
        f"adapter: r={adapter.r} on {len(parameters) // 2} of {num_layers} linear layers "
        f"({', '.join(targets)}), {count:,} parameters"
    )


def _accelerator(run: RunDir, plan: Plan, world: World) -> Any:
    """Accelerate's, for trackers, and for DeepSpeed with the run's own file."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    spec = plan.spec
    plugin = None
    if deepspeed_config(plan) is not None:
        plugin = DeepSpeedPlugin(
            hf_ds_config=str(run.root / "ds_config.json"), zero3_init_flag=False
        )
    made = Accelerator(
        # Told so, it would not take DeepSpeed.
        cpu=world.device.type == "cpu" and plugin is None,
        log_with=None if spec.tracking.kind == "none" else spec.tracking.kind,
        project_dir=str(run.root),
        deepspeed_plugin=plugin,
    )
    if plugin is not None:
        from transformers.integrations import unset_hf_deepspeed_config

        # Else transformers would have every model that it builds cut under zero3; ours is filled
        # piece by piece (qlora_dist.train.load).
        unset_hf_deepspeed_config()
    return made


def _autocast(spec: RunSpec, world: World) -> Callable[[], AbstractContextManager[Any]]:
    """What forward passes run in. A pass uses each weight once: copies would only take memory."""
    if spec.model.dtype != "bf16":
        return contextlib.nullcontext
    return partial(torch.autocast, world.device.type, torch.bfloat16, cache_enabled=False)


def _trackers(
    run: RunDir, spec: RunSpec, accelerator: Any, state: TrainState
) -> tuple[Callable[[dict[str, float], int], None], Callable[[], None]]:
    """Curves, which Accelerate gives: ``(track, finish)``."""
    if spec.tracking.kind == "none":
        return lambda *_: None, lambda: None
    # What an earlier attempt logged after its checkpoint gives way to this one's.
    accelerator.init_trackers(
        run.tracking.name, init_kwargs={"tensorboard": {"purge_step": state.step + 1}}
    )

    # Curves are a convenience: a disk that refuses them must not end a run. metrics.jsonl has all.
    def track(values: dict[str, float], step: int) -> None:
        with contextlib.suppress(OSError):
            accelerator.log(values, step=step)

    def finish() -> None:
        # Accelerate's end_training would take the process group down with the trackers.
        for item in accelerator.trackers:
            with contextlib.suppress(OSError):
                item.finish()

    return track, finish
