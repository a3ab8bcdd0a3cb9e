"""Sizes that the accounts of memory, disk and network are made of."""

import math
from dataclasses import dataclass

from qlora_dist.shapes import ModelShape
from qlora_dist.spec import LoraAdapter, Nf4Quantization, RunSpec

GIB = 2**30

# Strategies under which FSDP2 holds the base, and those of DeepSpeed.
SHARDED = ("fsdp", "hsdp")
ZERO = ("zero2", "zero3")
# What DeepSpeed is told: elements of the buffer that gradients are reduced in, and of the largest
# tensor that zero3 leaves whole on every process once it was gathered.
REDUCE_BUCKET = 2**24
PERSISTENT = 100_000

# bitsandbytes 0.50: NF4 in blocks of 64 weights, their constants again in blocks of 256.
NF4_BLOCK = 64
NESTED_BLOCK = 256
# Moments that share one constant in bitsandbytes' 8-bit optimizers.
OPTIMIZER_BLOCK = 256


# A matrix that is larger dequantised is dequantised in slices of at most this, or of what it is
# multiplied with: then a slice is not what memory runs out of, and few calls keep a GPU busy.
_SLICE_BYTES = 32 * 2**20

# The parts that the sum of an adapter's gradient behind dropout is put together of.
DROPOUT_PARTS_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Component:
    """One line of an account.

    Attributes:
        name: Of what.
        bytes: How much.
        why: What that follows from.
        in_torch: Whether torch's allocator holds it.
        paged: Whether it may move to host memory.
    """

    name: str
    bytes: int
    why: str
    in_torch: bool = True
    paged: bool = False


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


def trained_params(spec: RunSpec, shape: ModelShape) -> int:
    """Parameters that are trained: all, or r x (in + out) for each layer with an adapter."""
    if not isinstance(spec.adapter, LoraAdapter):
        return shape.num_params
    sizes = [shape.linears[name] for name in layer_targets(spec, shape)]
    return shape.num_layers * sum(spec.adapter.r * (rows + cols) for rows, cols in sizes)


def layer_targets(spec: RunSpec, shape: ModelShape) -> list[str]:
    """Linear layers of a decoder layer that get an adapter."""
    if not isinstance(spec.adapter, LoraAdapter):
        return []
    target = spec.adapter.target
    return list(shape.linears) if target == "all-linear" else target


def dtype_bytes(spec: RunSpec) -> int:
    """Bytes of a number that the model computes with."""
    return 2 if spec.model.dtype == "bf16" else 4


def trained_bytes(spec: RunSpec, shape: ModelShape) -> int:
    """Bytes of the trained weights, as they are stepped and saved; their gradients take as many."""
    return trained_params(spec, shape) * trained_dtype_bytes(spec)


def trained_dtype_bytes(spec: RunSpec) -> int:
    """Bytes of a trained number, and of its gradient."""
    return 2 if spec.adapter.dtype == "bf16" else 4


def cuts_trained(spec: RunSpec) -> bool:
    """Whether each of a sharded run's processes has only its rows of what is trained."""
    if spec.strategy.kind not in SHARDED:
        return False
    return spec.strategy.shard_adapter is True or not isinstance(spec.adapter, LoraAdapter)


def moments_of(spec: RunSpec) -> tuple[float, str]:
    """Bytes of optimizer state for one parameter, and what they are."""
    if spec.optimizer.kind == "adamw":
        size = trained_dtype_bytes(spec)
        return 2 * size, f"two moments of {size} bytes a parameter"
    if spec.optimizer.kind.endswith("_32bit"):
        return 8, "two moments of 4 bytes a parameter"
    return 2 + 2 * 4 / OPTIMIZER_BLOCK, f"two moments of 1 byte + 4/{OPTIMIZER_BLOCK} a parameter"


def moment_bytes(spec: RunSpec, shape: ModelShape) -> int:
    """Bytes of all optimizer state."""
    return int(moments_of(spec)[0] * trained_params(spec, shape))


def layer_bytes(spec: RunSpec, shape: ModelShape) -> int:
    """Bytes of the matrices of one decoder layer, as they are stored while training."""
    sizes = [rows * cols for rows, cols in shape.linears.values()]
    if isinstance(spec.quantization, Nf4Quantization):
        return sum(sum(nf4_bytes(size, double=spec.quantization.double)) for size in sizes)
    return sum(sizes) * dtype_bytes(spec)


def layer_elements(spec: RunSpec, shape: ModelShape) -> int:
    """Elements of what zero3 cuts of a decoder layer; NF4 is bytes to it."""
    sizes = [rows * cols for rows, cols in shape.linears.values()]
    if not isinstance(spec.adapter, LoraAdapter):
        return sum(sizes)
    trained = trained_params(spec, shape) // shape.num_layers
    if not isinstance(spec.quantization, Nf4Quantization):
        return sum(sizes) + trained
    constants = 1 if spec.quantization.double else 4
    return sum(size // 2 + constants * size // NF4_BLOCK for size in sizes) + trained


def base_bytes(spec: RunSpec, shape: ModelShape) -> int:
    """Bytes of the whole base, as it is stored while training."""
    kept = shape.num_embedding_params + shape.num_other_params
    return shape.num_layers * layer_bytes(spec, shape) + kept * dtype_bytes(spec)


def dequantised_slices(rows: int, width: int, element: int, tokens: int) -> int:
    """Into how many slices a quantised matrix is cut when it is multiplied.

    Args:
        rows: Its outputs.
        width: Its inputs.
        element: Bytes of a number of the computation.
        tokens: Rows of what it is multiplied with.
    """
    most = max(_SLICE_BYTES, tokens * max(rows, width) * element)
    return math.ceil(rows * width * element / most)
