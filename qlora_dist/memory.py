"""Bytes on one GPU, component by component: pure arithmetic over shapes.

Nothing is fitted. Each component says what it follows from, so that a wrong prediction can be
traced to a line.
"""

import math
from dataclasses import dataclass

from qlora_dist.shapes import ModelShape
from qlora_dist.spec import Nf4Quantization, RunSpec

GIB = 2**30

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

# bitsandbytes 0.50: NF4 in blocks of 64 weights, their constants again in blocks of 256.
# Moments that share one constant in bitsandbytes' 8-bit optimizers.
OPTIMIZER_BLOCK = 256
NF4_BLOCK = 64
NESTED_BLOCK = 256

# What a process holds outside torch's allocator. On a GPU: CUDA context, cuBLAS workspace, and
# (more than one process) NCCL's buffers. On a CPU: the interpreter and its libraries.
CONTEXT_BYTES = GIB
NCCL_BYTES = GIB // 2
INTERPRETER_BYTES = GIB


@dataclass(frozen=True)
class Component:
    """One line of the account; ``in_torch`` says whether torch's allocator holds it."""

    name: str
    bytes: int
    why: str
    in_torch: bool = True


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process's device.

    Attributes:
        components: The lines.
        peak_bytes: Their sum without the slack and paged moments, which torch's allocator does not
            know of: what it should report as its peak.
        needed_bytes: Their sum: what the device must have.
        available_bytes: What the named GPU has; None where none is named.
    """

    components: tuple[Component, ...]
    peak_bytes: int
    needed_bytes: int
    available_bytes: int | None

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None where no GPU is named."""
        return None if self.available_bytes is None else self.needed_bytes <= self.available_bytes


def nf4_bytes(num_weights: int, *, double: bool) -> tuple[int, int]:
    """Bytes of packed weights and of their constants.

    Args:
        num_weights: Weights of one matrix.
        double: Whether the constants are quantised again.

    Returns:
        ``(packed, constants)``. Constants are one fp32 a block; or, quantised, one byte a block and
        one fp32 per 256 blocks, with a 256-entry fp32 code and an fp32 offset.
    """
    blocks = math.ceil(num_weights / NF4_BLOCK)
    packed = math.ceil(num_weights / 2)
    codebook = 16 * 4
    if not double:
        return packed, blocks * 4 + codebook
    return packed, blocks + math.ceil(blocks / NESTED_BLOCK) * 4 + 256 * 4 + 4 + codebook


def adapter_params(spec: RunSpec, shape: ModelShape) -> int:
    """Parameters of the adapter: r x (in + out) for each linear layer that it is on."""
    sizes = [shape.linears[name] for name in _targets(spec, shape)]
    return shape.num_layers * sum(spec.adapter.r * (rows + cols) for rows, cols in sizes)


def layer_activation_bytes(spec: RunSpec, shape: ModelShape) -> int:
    """Bytes that one decoder layer keeps for its backward pass, per token.

    Counted over transformers' LLaMA layer with PEFT's LoRA around bitsandbytes' linear layers: a
    frozen product keeps no input, the adapter's keeps its own; dropout adds a copy and a mask
    byte for each layer that it feeds.
    """
    b = _dtype_bytes(spec)
    hidden, inner, r = shape.hidden_size, shape.intermediate_size, spec.adapter.r
    query, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    targets = set(_targets(spec, shape))
    norms = 2 * 4 * hidden  # both keep their input in fp32
    attention = b * (2 * query + 2 * key_value) + 4 * shape.num_heads  # q, k, v, out; log-sums
    mlp = b * 3 * inner  # gate, silu(gate), up

    def adapter_inputs(width: int, names: set[str]) -> int:
        fed = len(names & targets)
        if spec.adapter.dropout > 0:
            return fed * (b + 1) * width
        return b * width if fed else 0

    inputs = (
        adapter_inputs(hidden, {"q_proj", "k_proj", "v_proj"})
        # Attention's output is kept already; only dropout copies it.
        + (adapter_inputs(query, {"o_proj"}) if spec.adapter.dropout > 0 else 0)
        + adapter_inputs(hidden, {"gate_proj", "up_proj"})
        + adapter_inputs(inner, {"down_proj"})
    )
    return norms + attention + mlp + inputs + b * r * len(targets)


def plan_memory(
    spec: RunSpec, shape: ModelShape, *, world_size: int, gpus_per_node: int
) -> MemoryPlan:
    """Account for one process's device at the peak of a step with the longest allowed batch."""
    shards = _shards(spec, world_size, gpus_per_node)
    tokens = spec.batch.micro_size * spec.data.sequence_tokens
    lines = (
        *_weights(spec, shape, shards),
        *_training_state(spec, shape, shards, world_size),
        *_activations(spec, shape, tokens),
    )
    lines += (_slack(spec, world_size),)
    needed = sum(line.bytes for line in lines)
    peak = sum(line.bytes for line in lines if line.in_torch)
    return MemoryPlan(lines, peak, needed, gpu_bytes(spec.resources.gpu))


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
    parts = {
        "single": (1, 1, 1, 1),
        "ddp": (1, 1, 1, 1),
        # The adapter is whole on every process (qlora_dist.train.strategy).
        "fsdp": (world, 1, 1, world),
        "hsdp": (inside, 1, 1, inside),
        "zero2": (1, 1, world, world),
        "zero3": (world, world, world, world),
    }[spec.strategy.kind]
    return dict(zip(("weights", "adapter", "gradients", "optimizer"), parts, strict=True))


def _weights(spec: RunSpec, shape: ModelShape, shards: dict[str, int]) -> tuple[Component, ...]:
    b, parts = _dtype_bytes(spec), shards["weights"]
    cut = f", 1/{parts} of them" if parts > 1 else ""
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
    if parts > 1:
        layer = sum(sizes) * b
        if isinstance(spec.quantization, Nf4Quantization):
            layer = sum(sum(nf4_bytes(n, double=spec.quantization.double)) for n in sizes)
        why = "this layer's and the next one's, whole"
        lines.append(Component("gathered layers", 2 * layer, why))
        why = "embedding, head and last norm, whole for the length of a step"
        last = shape.num_embedding_params + shape.hidden_size
        lines.append(Component("gathered embedding", last * b, why))
    return tuple(lines)


def _training_state(
    spec: RunSpec, shape: ModelShape, shards: dict[str, int], world_size: int
) -> tuple[Component, ...]:
    count = adapter_params(spec, shape)
    size = 4 if spec.adapter.dtype == "fp32" else 2
    compute = _dtype_bytes(spec)
    # Autocast keeps a copy in the compute dtype for the length of a forward pass.
    copy = count * compute if compute < size else 0
    on_device = count // shards["adapter"] * size + copy
    gradients = count * size // shards["gradients"]
    moments, what = _moments(spec, size)
    paged = spec.optimizer.kind.startswith("paged_")
    return (
        Component(
            "adapter",
            on_device,
            f"{count:,} x {size} bytes" + (f", and a {spec.model.dtype} copy" if copy else ""),
        ),
        Component(
            "gradients",
            gradients,
            f"{count:,} x {size} bytes, one buffer"
            + (", reduced in place" if world_size > 1 else ""),
        ),
        Component(
            "optimizer",
            int(moments * count) // shards["optimizer"],
            what + (", paged: may move to host memory" if paged else ""),
            in_torch=not paged,
        ),
    )


def _moments(spec: RunSpec, size: int) -> tuple[float, str]:
    """Bytes of optimizer state for one parameter of ``size`` bytes, and what they are."""
    if spec.optimizer.kind == "adamw":
        return 2 * size, f"two moments of {size} bytes a parameter"
    if spec.optimizer.kind.endswith("_32bit"):
        return 8, "two moments of 4 bytes a parameter"
    return 2 + 2 * 4 / OPTIMIZER_BLOCK, (f"two moments of 1 byte + 4/{OPTIMIZER_BLOCK} a parameter")


def _activations(spec: RunSpec, shape: ModelShape, tokens: int) -> tuple[Component, ...]:
    b = _dtype_bytes(spec)
    layer = layer_activation_bytes(spec, shape) * tokens
    if spec.model.gradient_checkpointing:
        kept = shape.num_layers * b * shape.hidden_size * tokens + layer
        why = f"{shape.num_layers} layer inputs and one whole layer of {tokens:,} tokens"
    else:
        kept = shape.num_layers * layer
        why = f"{shape.num_layers} whole layers of {tokens:,} tokens"
    largest = max(rows * cols for rows, cols in shape.linears.values())
    workspace = largest * b if spec.quantization.kind == "nf4" else 0
    # The head's output in the compute dtype, and its log-softmax and that one's gradient in fp32.
    logits = tokens * shape.vocab_size * (b + 4 + 4)
    return (
        Component("activations", kept, why),
        Component(
            "logits", logits, f"{tokens:,} tokens x {shape.vocab_size:,} x ({b} + 4 + 4) bytes"
        ),
        Component("workspace", workspace, "the largest matrix, dequantised"),
    )


def _slack(spec: RunSpec, world_size: int) -> Component:
    if spec.resources.gpus_per_node == 0:
        return Component("slack", INTERPRETER_BYTES, "the interpreter and its libraries", False)
    slack = CONTEXT_BYTES + (NCCL_BYTES if world_size > 1 else 0)
    why = "CUDA context and workspaces outside torch's allocator"
    return Component("slack", slack, why, in_torch=False)


def _targets(spec: RunSpec, shape: ModelShape) -> list[str]:
    target = spec.adapter.target
    return list(shape.linears) if target == "all-linear" else target


def _dtype_bytes(spec: RunSpec) -> int:
    return 2 if spec.model.dtype == "bf16" else 4
