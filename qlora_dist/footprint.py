"""What a run takes beside GPU memory: host memory, disk, and bytes between GPUs."""

from dataclasses import dataclass

from qlora_dist.shapes import ModelShape
from qlora_dist.sizes import (
    GIB,
    Component,
    base_bytes,
    cuts_trained,
    dtype_bytes,
    moment_bytes,
    trained_bytes,
)
from qlora_dist.spec import LoraAdapter, Nf4Quantization, RunSpec

# A training process without tensors: the interpreter, torch, CUDA's libraries.
_PROCESS_BYTES = GIB
# The pieces of the base that are read ahead (qlora_dist.train.base_files).
_READ_AHEAD_BYTES = 8 * 32 * 2**20


@dataclass(frozen=True)
class Footprint:
    """What a run takes beside the memory of its GPUs.

    Attributes:
        host: Memory of the process that takes most, rank 0.
        disk: Files that the run writes.
        network: What a process receives from others in a step; None where that is not known.
    """

    host: tuple[Component, ...]
    disk: tuple[Component, ...]
    network: tuple[Component, ...] | None


def footprint(
    spec: RunSpec, shape: ModelShape, *, world_size: int, accumulation: int, steps: int | None
) -> Footprint:
    """Account for everything but GPU memory.

    Args:
        spec: The run.
        shape: Its model.
        world_size: Processes.
        accumulation: Forward passes of a process in a step.
        steps: Optimizer steps; None if that is not known yet.
    """
    return Footprint(
        host=_host(spec, shape, world_size),
        disk=_disk(spec, shape, steps),
        network=_network(spec, shape, world_size, accumulation),
    )


def _host(spec: RunSpec, shape: ModelShape, world_size: int) -> tuple[Component, ...]:
    # Under fsdp moments are shared out; else rank 0 has all of them.
    parts = world_size if spec.strategy.kind == "fsdp" else 1
    own = moment_bytes(spec, shape) // parts
    weights = trained_bytes(spec, shape) // (parts if cuts_trained(spec) else 1)
    what = "adapter" if isinstance(spec.adapter, LoraAdapter) else "weights"
    lines = [
        Component("process", _PROCESS_BYTES, "the interpreter and its libraries"),
        Component("reading ahead", _READ_AHEAD_BYTES, "8 pieces of 32 MiB, while the base loads"),
        Component(
            "copies for a save",
            weights + own,
            f"the {what} and the moments that this process saves",
        ),
    ]
    if spec.optimizer.kind.startswith("paged_"):
        lines.append(Component("paged moments", own, "only what the GPU has no room for"))
    return tuple(lines)


def _disk(spec: RunSpec, shape: ModelShape, steps: int | None) -> tuple[Component, ...]:
    keep, one = spec.checkpoint, trained_bytes(spec, shape) + moment_bytes(spec, shape)
    if isinstance(spec.adapter, LoraAdapter):
        end = Component("adapter", trained_bytes(spec, shape), "RUN/adapter")
    else:
        end = Component("model", shape.num_params * dtype_bytes(spec), "RUN/model")
    number, why = keep.keep_last + 1, f"{keep.keep_last} kept, one being written"
    if keep.keep_best and spec.data.validation_rows:
        number, why = number + 1, f"{why}, the best"
    if keep.keep_every is not None:
        for_good = 0 if steps is None else steps // keep.keep_every
        number += for_good
        why += f", {for_good if steps else 'and'} of every {keep.keep_every} steps"
    lines = [
        Component("one checkpoint", one, "what is trained, and its moments"),
        Component("checkpoints", number * one, why),
        end,
    ]
    nf4 = spec.quantization
    if isinstance(nf4, Nf4Quantization) and nf4.cache_dir is not None:
        lines.append(Component("NF4 cache", base_bytes(spec, shape), nf4.cache_dir))
    return tuple(lines)


def _network(
    spec: RunSpec, shape: ModelShape, world_size: int, accumulation: int
) -> tuple[Component, ...] | None:
    if world_size == 1:
        return ()
    if spec.strategy.kind not in ("ddp", "fsdp"):
        return None
    trained = trained_bytes(spec, shape)

    def line(name: str, num_bytes: int, why: str) -> Component:
        """A line of what all processes have together, of which a process has its part already."""
        return Component(name, num_bytes * (world_size - 1) // world_size, why)

    ring = line("gradients", 2 * trained, "summed around a ring, once a step")
    if spec.strategy.kind == "ddp":
        return (ring,)
    ends = (shape.num_embedding_params + shape.hidden_size) * dtype_bytes(spec)
    layers = base_bytes(spec, shape) - ends
    base = line(
        "base",
        accumulation * (2 * layers + ends),
        f"{accumulation} x (layers twice, embedding and head once), the others' part",
    )
    if not cuts_trained(spec):
        return ring, base, line("adapter", trained, "what the others have stepped")
    rows = line("gradients", accumulation * trained, f"{accumulation} x this process's rows")
    if not isinstance(spec.adapter, LoraAdapter):
        return rows, base
    return rows, base, line("adapter", 2 * accumulation * trained, f"{accumulation} x twice")
