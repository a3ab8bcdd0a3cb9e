"""Plans and bundles as text for a person."""

import shlex
from collections.abc import Iterator

from qlora_dist.plan import Plan
from qlora_dist.sizes import GIB
from qlora_launch.render import Bundle


def plan_text(plan: Plan) -> str:
    """A plan, line by line, each with what it follows from."""
    return "\n".join(_plan_lines(plan))


def bundle_text(bundle: Bundle) -> str:
    """A bundle: every file, the command, and the variables that it adds."""
    parts = [f"run directory: {bundle.run_dir}"]
    # Scripts after the data: they are what is looked for, and the end is what is seen.
    for name, text in sorted(bundle.files.items(), key=lambda item: item[0].endswith(".sh")):
        parts.append(f"--- {name}\n{text.rstrip()}")
    parts.append("--- command\n" + shlex.join(bundle.argv))
    parts.append("--- environment\n" + "\n".join(f"{k}={v}" for k, v in bundle.env.items()))
    return "\n".join(parts)


def _plan_lines(plan: Plan) -> Iterator[str]:
    spec, shape, topology = plan.spec, plan.shape, plan.topology
    where = "GPU" if topology.device == "cuda" else "CPU process"
    yield f"{spec.name}: {spec.model.source}, {shape.num_params / 1e9:.2f} B parameters"
    yield ""
    yield "topology"
    yield _row(
        "processes",
        f"{topology.world_size}",
        f"{topology.nodes} node x {topology.processes_per_node}, one a {where}, "
        f"strategy {spec.strategy.kind}, backend {spec.resources.backend}",
    )
    yield "batch"
    yield _row(
        "global",
        f"{plan.batch.global_size} sequences",
        f"{topology.world_size} processes x {plan.batch.micro_size} (micro) x "
        f"{plan.batch.accumulation} (accumulation)",
    )
    yield _row(
        "tokens a step",
        f"<= {plan.batch.max_tokens:,}",
        f"{plan.batch.global_size} x {spec.data.sequence_tokens} tokens, the data limits",
    )
    yield "length"
    yield from _length_lines(plan)
    yield f"memory of one {where}"
    for line in plan.memory.components:
        yield _row(line.name, _gib(line.bytes), line.why)
    yield _row(
        "predicted peak",
        _gib(plan.memory.peak_bytes),
        f"what torch's allocator holds at {plan.memory.moment}",
    )
    yield _row("needed", _gib(plan.memory.needed_bytes), "the sum")
    yield _fit_line(plan)
    for fit in plan.would_fit:
        how = " ".join(f"{key}={_yaml(value)}" for key, value in fit.changes.items())
        yield _row("would fit", _gib(fit.needed_bytes), f"with {how}")
    yield from _footprint_lines(plan)
    for reason in plan.not_runnable:
        yield f"does not run yet: {reason}"


def _length_lines(plan: Plan) -> Iterator[str]:
    length, schedule = plan.length, plan.spec.schedule
    unknown = "unknown until the data is counted; or give data.num_samples"
    if plan.corpus is not None:
        why = "best-fit packs of samples" if plan.spec.data.packing else "one sample each"
        yield _row("sequences", f"{plan.corpus.num_sequences:,}", f"{why}, as tokenised")
        useful = f"of {plan.corpus.num_tokens:,} tokens an epoch and their padding"
        yield _row("useful tokens", f"{plan.corpus.useful:.1%}", useful)
    elif length.num_sequences is None:
        yield _row("sequences", "unknown", "run `qlora data` first, or give data.num_samples")
    else:
        yield _row("sequences", f"{length.num_sequences:,}", "data.num_samples")
    if length.steps is None:
        yield _row("steps", "unknown", unknown)
    else:
        why = "schedule.steps" if schedule.steps else f"{schedule.epochs} epochs / global batch"
        yield _row("steps", f"{length.steps:,}", why)
        yield _row(
            "learning rate",
            f"{plan.spec.optimizer.lr:g}",
            f"{schedule.kind}, {length.warmup_steps} steps of warm-up",
        )
        yield _row("tokens", f"<= {length.max_tokens:,}", "steps x tokens a step")
    if schedule.epochs is None and length.epochs is not None:
        yield _row("epochs", f"{length.epochs:.2f}", "steps x global batch / sequences")


def _fit_line(plan: Plan) -> str:
    memory, name = plan.memory, plan.spec.resources.gpu
    if plan.topology.device == "cpu":
        return _row("fits", "unknown", "host memory; the account above is of one process")
    if memory.available_bytes is None:
        return _row("fits", "unknown", "name the GPU: resources.gpu=h100-80gb")
    gap = memory.available_bytes - memory.needed_bytes
    if gap >= 0:
        return _row(
            "fits", "yes", f"{name} has {_gib(memory.available_bytes)}, {_gib(gap)} to spare"
        )
    if memory.paged_bytes >= -gap:
        why = f"{name} has {_gib(memory.available_bytes)}: {_gib(-gap)} of paged moments move"
        return _row("fits", "by paging", f"{why} to host memory, which slows the optimizer down")
    return _row("fits", "no", f"{name} has {_gib(memory.available_bytes)}, {_gib(-gap)} too little")


def _footprint_lines(plan: Plan) -> Iterator[str]:
    found = plan.footprint
    yield "host memory of one process"
    yield from (_row(line.name, _gib(line.bytes), line.why) for line in found.host)
    yield "disk"
    yield from (_row(line.name, _gib(line.bytes), line.why) for line in found.disk)
    if found.network:
        yield "received by one process in a step"
        yield from (_row(line.name, _gib(line.bytes), line.why) for line in found.network)


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _row(name: str, value: str, why: str) -> str:
    return f"  {name:<24}{value:>16}   {why}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
