"""Bytes on one GPU, component by component: pure arithmetic over shapes.

Nothing is fitted. Each component says what it follows from, so that a wrong prediction can be
traced to a line.
"""

from dataclasses import dataclass

from qlora_dist.activations import Moment, moments
from qlora_dist.shapes import ModelShape
from qlora_dist.sizes import (
    GIB,
    NF4_BLOCK,
    REDUCE_BUCKET,
    SHARDED,
    ZERO,
    Component,
    cuts_trained,
    dtype_bytes,
    layer_bytes,
    moments_of,
    nf4_bytes,
    trained_bytes,
    trained_dtype_bytes,
    trained_params,
)
from qlora_dist.spec import LoraAdapter, Nf4Quantization, RunSpec

# Total memory in MiB, as nvidia-smi reports it.
GPU_MIB: dict[str, int] = {
    "t4-16gb": 15360,
    "l4-24gb": 23034,
    "rtx3090-24gb": 24576,
    "rtx4090-24gb": 24564,
    "v100-32gb": 32768,
    "a100-40gb": 40960,
    "l40s-48gb": 46068,
    "a6000-48gb": 49140,
    "a100-80gb": 81920,
    "h100-80gb": 81559,
    "h200-141gb": 143771,
}

# GPUs without bf16.
BEFORE_AMPERE = frozenset({"t4-16gb", "v100-32gb"})

# cuBLAS has one for each thread that uses it, of the forward and of the backward pass, and torch's
# allocator gives it: CUBLAS_WORKSPACE_CONFIG=:4096:8, which every process is started with.
WORKSPACE_BYTES = 2 * 8 * 4096 * 2**10

# What a process holds outside torch's allocator. On a GPU: CUDA context, and (more than one
# process) NCCL's buffers. On a CPU: the interpreter and its libraries.
CONTEXT_BYTES = GIB
NCCL_BYTES = GIB // 2
INTERPRETER_BYTES = GIB


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process's device.

    Attributes:
        components: The lines.
        moment: When so much is held.
        peak_bytes: Their sum without the slack and paged moments, which torch's allocator does not
            know of: what it should report as its peak.
        needed_bytes: Their sum: what the device must have.
        available_bytes: What the named GPU has; None where none is named.
    """

    components: tuple[Component, ...]
    moment: str
    peak_bytes: int
    needed_bytes: int
    available_bytes: int | None

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None where no GPU is named."""
        return None if self.available_bytes is None else self.needed_bytes <= self.available_bytes

    @property
    def paged_bytes(self) -> int:
        """What may move to host memory: paged moments."""
        return sum(line.bytes for line in self.components if line.paged)


def plan_memory(
    spec: RunSpec, shape: ModelShape, *, world_size: int, gpus_per_node: int, attention: str
) -> MemoryPlan:
    """Account for one process's device at the peak of a step with the longest allowed batch.

    Args:
        spec: The run.
        shape: Its model.
        world_size: Processes.
        gpus_per_node: Of them, on one machine.
        attention: The attention kernel.
    """
    spec = settled(
        spec, shape, world_size=world_size, gpus_per_node=gpus_per_node, attention=attention
    )
    shards = _shards(spec, world_size, gpus_per_node)
    state = (
        *_weights(spec, shape, shards),
        *_training_state(spec, shape, shards, world_size),
        *_engine(spec, shape, world_size),
        *_workspaces(spec),
    )
    at_each = [
        (moment.name, (*moment.components, *_gathered(spec, shape, shards, moment)))
        for moment in moments(spec, shape, attention=attention)
    ]
    name, held = max(at_each, key=lambda item: sum(line.bytes for line in item[1]))
    lines = (*state, *held, _slack(spec, world_size))
    needed = sum(line.bytes for line in lines)
    peak = sum(line.bytes for line in lines if line.in_torch)
    return MemoryPlan(lines, name, peak, needed, gpu_bytes(spec.resources.gpu))


def settled(
    spec: RunSpec, shape: ModelShape, *, world_size: int, gpus_per_node: int, attention: str
) -> RunSpec:
    """The spec with what it leaves to the plan; arguments as in :func:`plan_memory`.

    An adapter is cut where the run does not fit otherwise.
    """
    if spec.strategy.shard_adapter != "auto":
        return spec

    def choice(cut: bool) -> RunSpec:
        strategy = spec.strategy.model_copy(update={"shard_adapter": cut})
        return spec.model_copy(update={"strategy": strategy})

    def fits(spec: RunSpec) -> bool:
        memory = plan_memory(
            spec, shape, world_size=world_size, gpus_per_node=gpus_per_node, attention=attention
        )
        return memory.fits is not False

    may = (
        isinstance(spec.adapter, LoraAdapter)
        and spec.strategy.kind in SHARDED
        and not spec.optimizer.kind.endswith("_8bit")
    )
    return choice(may and not fits(choice(False)))


def gpu_bytes(name: str | None) -> int | None:
    """Memory of a GPU named as in the spec; None for no name or an unknown one."""
    if name is None:
        return None
    key = name.lower()
    if key in GPU_MIB:
        return GPU_MIB[key] * 2**20
    if key.endswith("gib") and key[:-3].isdigit():
        return int(key[:-3]) * GIB
    return None


def _shards(spec: RunSpec, world_size: int, gpus_per_node: int) -> dict[str, int]:
    """Into how many parts the base, the adapter, its gradients and its moments are cut."""
    world, inside = world_size, max(1, min(world_size, gpus_per_node))
    # An adapter may be whole on every process (qlora_dist.train.trained).
    rows = cuts_trained(spec)
    parts = {
        "single": (1, 1, 1, 1),
        "ddp": (1, 1, 1, 1),
        "fsdp": (world, world if rows else 1, world if rows else 1, world),
        "hsdp": (inside, inside if rows else 1, inside if rows else 1, inside),
        "zero2": (1, 1, world, world),
        "zero3": (world, world, world, world),
    }[spec.strategy.kind]
    return dict(zip(("weights", "adapter", "gradients", "optimizer"), parts, strict=True))


def _weights(spec: RunSpec, shape: ModelShape, shards: dict[str, int]) -> tuple[Component, ...]:
    b, parts = dtype_bytes(spec), shards["weights"]
    cut = f", 1/{parts} of them" if parts > 1 else ""
    if not isinstance(spec.adapter, LoraAdapter):
        # They are what is trained.
        return ()
    kept = shape.num_embedding_params + shape.num_other_params
    sizes = [rows * cols for rows, cols in shape.linears.values()]
    lines = []
    if isinstance(spec.quantization, Nf4Quantization):
        pairs = [nf4_bytes(size, double=spec.quantization.double) for size in sizes]
        packed = shape.num_layers * sum(pair[0] for pair in pairs)
        constants = shape.num_layers * sum(pair[1] for pair in pairs)
        double = "1 byte + 4/256" if spec.quantization.double else "4 bytes"
        lines += [
            Component(
                "weights, NF4", packed // parts, f"{shape.num_linear_params:,} x 4 bits{cut}"
            ),
            Component(
                "quantisation constants",
                constants // parts,
                f"{double} a block of {NF4_BLOCK} weights{cut}",
            ),
            Component(
                f"weights, {spec.model.dtype}",
                kept * b // parts,
                f"embedding, head, norms: {kept:,} x {b} bytes{cut}",
            ),
        ]
    else:
        total = shape.num_params
        lines.append(
            Component(
                f"weights, {spec.model.dtype}", total * b // parts, f"{total:,} x {b} bytes{cut}"
            )
        )
    return tuple(lines)


def _gathered(
    spec: RunSpec, shape: ModelShape, shards: dict[str, int], moment: Moment
) -> tuple[Component, ...]:
    """What FSDP2 has put together again of the base."""
    if shards["weights"] == 1:
        return ()
    ends = (shape.num_embedding_params + shape.hidden_size) * dtype_bytes(spec)
    why = "embedding, head and last norm, whole for the length of a step"
    if moment.gathered_ends > 1:
        why += ", and as they came"
    if not moment.gathered_ends:
        return ()
    lines = [Component("gathered embedding", moment.gathered_ends * ends, why)]
    if moment.gathered_layers:
        why = "two layers, or one twice: this one's and the next one's, as it comes"
        size = layer_bytes(spec, shape)
        if shards["adapter"] > 1 and isinstance(spec.adapter, LoraAdapter):
            size += trained_bytes(spec, shape) // shape.num_layers
        size *= moment.gathered_layers
        lines.append(Component("gathered layers", size, why))
    return tuple(lines)


def _training_state(
    spec: RunSpec, shape: ModelShape, shards: dict[str, int], world_size: int
) -> tuple[Component, ...]:
    count, size = trained_params(spec, shape), trained_dtype_bytes(spec)
    what_trains = "adapter" if isinstance(spec.adapter, LoraAdapter) else "weights, trained"
    on_device = count * size // shards["adapter"]
    gradients = count * size // shards["gradients"]
    cut = f", 1/{shards['adapter']} of them" if shards["adapter"] > 1 else ""
    part = f", 1/{shards['gradients']} of them" if shards["gradients"] > 1 else ""
    a_parameter, what = moments_of(spec)
    paged = spec.optimizer.kind.startswith("paged_")
    return (
        Component(what_trains, on_device, f"{count:,} x {size} bytes{cut}"),
        Component(
            "gradients",
            gradients,
            f"{count:,} x {size} bytes, one buffer{part}"
            + (", reduced in place" if world_size > 1 and shards["gradients"] == 1 else ""),
        ),
        Component(
            "optimizer",
            int(a_parameter * count) // shards["optimizer"],
            what + (", paged: may move to host memory" if paged else ""),
            in_torch=not paged,
            paged=paged,
        ),
    )


def _engine(spec: RunSpec, shape: ModelShape, world_size: int) -> tuple[Component, ...]:
    """What DeepSpeed holds beside."""
    if spec.strategy.kind not in ZERO:
        return ()
    count = trained_params(spec, shape)
    return (
        Component(
            "masters", 4 * count // world_size, f"what is stepped, in float32, 1/{world_size} of it"
        ),
        Component("reduction bucket", 4 * REDUCE_BUCKET, f"{REDUCE_BUCKET:,} gradients x 4 bytes"),
    )


def _workspaces(spec: RunSpec) -> tuple[Component, ...]:
    if spec.resources.gpus_per_node == 0:
        return ()
    why = "cuBLAS, forward and backward: 32 MiB each"
    return (Component("workspaces", WORKSPACE_BYTES, why),)


def _slack(spec: RunSpec, world_size: int) -> Component:
    if spec.resources.gpus_per_node == 0:
        return Component("slack", INTERPRETER_BYTES, "the interpreter and its libraries", False)
    slack = CONTEXT_BYTES + (NCCL_BYTES if world_size > 1 else 0)
    why = "CUDA context, outside torch's allocator"
    return Component("slack", slack, why, in_torch=False)
