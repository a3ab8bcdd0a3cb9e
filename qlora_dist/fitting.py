"""What would make a run fit that does not: changes of its spec, each planned."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_dist.memory import BEFORE_AMPERE, GPU_MIB, plan_memory
from qlora_dist.shapes import ModelShape
from qlora_dist.sizes import cuts_trained
from qlora_dist.spec import RunSpec

# GPUs of one node where a spec says nothing of more.
_NODE = 8
_MOST_GPUS = 1024
# Those that change speed alone come first, then those that change what is trained.
_SMALLER: tuple[tuple[str, Any], ...] = (
    ("model.gradient_checkpointing", True),
    ("batch.micro_size", 1),
    ("evaluation.micro_size", 1),
    ("quantization.double", True),
    ("adapter.dtype", "bf16"),
    ("optimizer.kind", "paged_adamw_8bit"),
)


@dataclass(frozen=True)
class Fit:
    """A way to make a run fit.

    Attributes:
        changes: Keys of the spec and their new values, as the command line takes them.
        needed_bytes: What a GPU must have then.
    """

    changes: Mapping[str, Any]
    needed_bytes: int


def what_fits(spec: RunSpec, shape: ModelShape, *, attention: str) -> tuple[Fit, ...]:
    """Ways to make a run fit: a smaller run on the same GPUs, more GPUs, larger ones.

    Args:
        spec: A run whose GPU is too small.
        shape: Its model.
        attention: Its attention kernel.
    """
    found = [
        _smaller(spec, shape, attention),
        _more_gpus(spec, shape, attention),
        _larger_gpu(spec, shape, attention),
    ]
    return tuple(fit for fit in found if fit is not None)


def what_takes_less(spec: RunSpec, shape: ModelShape, *, attention: str) -> tuple[Fit, ...]:
    """Single changes that need less memory on the same GPUs, those that keep the result first.

    Args:
        spec: The run.
        shape: Its model.
        attention: Its attention kernel.
    """
    before = _planned(spec, shape, attention, {})[0].needed_bytes
    found = [
        _planned(spec, shape, attention, {key: value})[0]
        for key, value in _SMALLER
        # Moments in 8 bits are not for an adapter in rows, which this run may have by now.
        if _value(spec, key) not in (None, value)
        and not (key == "optimizer.kind" and cuts_trained(spec))
    ]
    return tuple(fit for fit in found if fit.needed_bytes < before)


def changed(spec: RunSpec, changes: Mapping[str, Any]) -> RunSpec:
    """The spec with other values, unchecked."""
    for key, value in changes.items():
        section, _, name = key.partition(".")
        part = getattr(spec, section).model_copy(update={name: value})
        spec = spec.model_copy(update={section: part})
    return spec


def _planned(
    spec: RunSpec, shape: ModelShape, attention: str, changes: Mapping[str, Any]
) -> tuple[Fit, bool]:
    """A spec with changes, and whether it fits."""
    new = changed(spec, changes)
    resources = new.resources
    memory = plan_memory(
        new,
        shape,
        world_size=resources.nodes * resources.gpus_per_node,
        gpus_per_node=resources.gpus_per_node,
        attention=attention,
    )
    return Fit(changes, memory.needed_bytes), bool(memory.fits)


def _smaller(spec: RunSpec, shape: ModelShape, attention: str) -> Fit | None:
    """As few changes of the run as make it fit where it is."""
    options = {
        key: value
        for key, value in _SMALLER
        if _value(spec, key) not in (None, value)
        and not (key == "optimizer.kind" and cuts_trained(spec))
    }
    chosen: dict[str, Any] = {}
    best, fits = _planned(spec, shape, attention, chosen)
    for key, value in options.items():
        if fits:
            break
        fit, fits = _planned(spec, shape, attention, {**chosen, key: value})
        if fit.needed_bytes < best.needed_bytes:
            chosen, best = {**chosen, key: value}, fit
    if not fits:
        return None
    # What a later change has made superfluous.
    for key in list(chosen):
        fewer = {k: v for k, v in chosen.items() if k != key}
        fit, still = _planned(spec, shape, attention, fewer)
        if still:
            chosen, best = fewer, fit
    return best


def _more_gpus(spec: RunSpec, shape: ModelShape, attention: str) -> Fit | None:
    """As few GPUs as hold it under fsdp, those that there are at first, if the batch divides."""
    resources = spec.resources
    nodes, gpus = resources.nodes, resources.gpus_per_node
    while nodes * gpus <= _MOST_GPUS:
        count = nodes * gpus
        wanted: dict[str, Any] = {
            "strategy.kind": "fsdp",
            "resources.nodes": nodes,
            "resources.gpus_per_node": gpus,
        }
        if nodes > 1 and resources.backend == "local":
            wanted["resources.backend"] = "slurm"
        changes = {key: value for key, value in wanted.items() if _value(spec, key) != value}
        divides = spec.batch.global_size % (count * spec.batch.micro_size) == 0
        if changes and divides and count > 1:
            fit, fits = _planned(spec, shape, attention, changes)
            if fits:
                return fit
        # The node is filled first, then there are more of them.
        if nodes == 1 and 2 * gpus <= _NODE:
            gpus *= 2
        else:
            nodes *= 2
    return None


def _larger_gpu(spec: RunSpec, shape: ModelShape, attention: str) -> Fit | None:
    """The smallest GPU that holds it as it is."""
    for name in sorted(GPU_MIB, key=lambda name: GPU_MIB[name]):
        if name in BEFORE_AMPERE and spec.model.dtype == "bf16":
            continue
        fit, fits = _planned(spec, shape, attention, {"resources.gpu": name})
        if fits:
            return fit
    return None


def _value(spec: RunSpec, key: str) -> Any:
    """A value of the spec; None where its section has no such key."""
    section, _, name = key.partition(".")
    return getattr(getattr(spec, section), name, None)
