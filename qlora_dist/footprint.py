"""What a run takes beside GPU memory: host memory, disk, and bytes between GPUs."""

from dataclasses import dataclass

from qlora_dist.shapes import ModelShape
from qlora_dist.sizes import (
    GIB,
    SHARDED,
    ZERO,
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
        network: What a process receives from others in a step.
    """

    host: tuple[Component, ...]
    disk: tuple[Component, ...]
    network: tuple[Component, ...]


def footprint(
    spec: RunSpec,
    shape: ModelShape,
    *,
    world_size: int,
    gpus_per_node: int,
    accumulation: int,
    steps: int | None,
) -> Footprint:
    """Account for everything but GPU memory.

    Args:
        spec: The run.
        shape: Its model.
        world_size: Processes.
        gpus_per_node: Of them, on one machine.
        accumulation: Forward passes of a process in a step.
        steps: Optimizer steps; None if that is not known yet.
    """
    return Footprint(
        host=_host(spec, shape, world_size, gpus_per_node),
        disk=_disk(spec, shape, steps),
        network=_network(spec, shape, world_size, gpus_per_node, accumulation),
    )


def _host(
    spec: RunSpec, shape: ModelShape, world_size: int, gpus_per_node: int
) -> tuple[Component, ...]:
    # Where moments are shared out each process saves its own; else rank 0 has all of them.
    kind = spec.strategy.kind
    parts = {"hsdp": gpus_per_node}.get(kind, world_size) if kind in (*SHARDED, *ZERO) else 1
    own = moment_bytes(spec, shape) // parts
    cut = cuts_trained(spec) or kind in ZERO
    weights = trained_bytes(spec, shape) // (parts if cut else 1)
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
    spec: RunSpec, shape: ModelShape, world_size: int, gpus_per_node: int, accumulation: int
) -> tuple[Component, ...]:
    if world_size == 1:
        return ()
    kind = spec.strategy.kind
    trained = trained_bytes(spec, shape)

    def line(name: str, num_bytes: int, processes: int, why: str) -> Component:
        """A line of what so many have together, of which a process has its part already."""
        return Component(name, num_bytes * (processes - 1) // processes, why)

    ring = line("gradients", 2 * trained, world_size, "summed around a ring, once a step")
    if kind == "ddp":
        return (ring,)
    holders, where = world_size, "the others' part"
    if kind == "hsdp":
        holders, where = gpus_per_node, "the part of the others on the node"
    if kind == "zero2":
        why = f"{accumulation} x summed around a ring"
        return (
            line("gradients", 2 * accumulation * trained, world_size, why),
            line("weights", trained, world_size, "what the others have stepped"),
        )
    ends = (shape.num_embedding_params + shape.hidden_size) * dtype_bytes(spec)
    layers = base_bytes(spec, shape) - ends
    base = line(
        "base",
        accumulation * (2 * layers + ends),
        holders,
        f"{accumulation} x (layers twice, embedding and head once), {where}",
    )
    if not cuts_trained(spec) and kind != "zero3":
        return ring, base, line("adapter", trained, holders, "what the others have stepped")
    lines = [
        line("gradients", accumulation * trained, holders, f"{accumulation} x this process's rows")
    ]
    if nodes := world_size // holders - 1:
        why = f"these rows, summed over {nodes + 1} nodes, once a step"
        lines.append(line("gradients, nodes", 2 * trained // holders, nodes + 1, why))
    lines.append(base)
    if isinstance(spec.adapter, LoraAdapter):
        why = f"{accumulation} x twice, {where}"
        lines.append(line("adapter", 2 * accumulation * trained, holders, why))
    return tuple(lines)
