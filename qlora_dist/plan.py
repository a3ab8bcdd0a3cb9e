"""Plan: every number that follows from a spec, and nothing else.

``make_plan`` is pure but for one thing: a model's local config.json is read for its shape. It
refuses what cannot be, all problems at once, each with a value that would work.
"""

import difflib
import importlib.util
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qlora_dist.errors import PlanError
from qlora_dist.fitting import Fit, what_fits
from qlora_dist.footprint import Footprint, footprint
from qlora_dist.memory import GPU_MIB, MemoryPlan, gpu_bytes, plan_memory, settled
from qlora_dist.resume import spec_sha256
from qlora_dist.shapes import ModelShape, find_shape
from qlora_dist.sizes import NF4_BLOCK, SHARDED, ZERO, cuts_trained, trained_params
from qlora_dist.spec import LoraAdapter, RunSpec


@dataclass(frozen=True)
class Topology:
    """Which processes there are."""

    nodes: int
    processes_per_node: int
    device: Literal["cuda", "cpu"]

    @property
    def world_size(self) -> int:
        """Processes over all nodes."""
        return self.nodes * self.processes_per_node


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is shared out.

    Attributes:
        global_size: Sequences in an optimizer step.
        micro_size: Sequences in one forward pass.
        accumulation: Forward passes of one process in a step.
        max_tokens: Most tokens that a step can have.
    """

    global_size: int
    micro_size: int
    accumulation: int
    max_tokens: int


@dataclass(frozen=True)
class CorpusFacts:
    """What is known of the data once it has been tokenised.

    Attributes:
        num_samples: Samples in an epoch.
        num_sequences: Sequences in an epoch: the samples, or packs of them.
        num_tokens: Tokens in an epoch.
        useful: Part of what a forward pass computes that is not padding.
    """

    num_samples: int
    num_sequences: int
    num_tokens: int
    useful: float


@dataclass(frozen=True)
class Length:
    """How long the run is, in sequences; None is what only the data can tell."""

    steps: int | None
    warmup_steps: int | None
    num_sequences: int | None
    epochs: float | None
    max_tokens: int | None


@dataclass(frozen=True)
class Plan:
    """The whole plan of a run."""

    spec: RunSpec
    shape: ModelShape
    topology: Topology
    batch: BatchPlan
    length: Length
    corpus: CorpusFacts | None
    num_trained_params: int
    memory: MemoryPlan
    would_fit: tuple[Fit, ...]
    footprint: Footprint
    not_runnable: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for ``plan --json``."""
        return {
            "name": self.spec.name,
            "spec_sha256": spec_sha256(self.spec),
            "shape": self.shape.model_dump(),
            "num_base_params": self.shape.num_params,
            "num_trained_params": self.num_trained_params,
            "topology": asdict(self.topology) | {"world_size": self.topology.world_size},
            "batch": asdict(self.batch),
            "length": asdict(self.length),
            "corpus": asdict(self.corpus) if self.corpus else None,
            "memory": asdict(self.memory) | {"fits": self.memory.fits},
            "would_fit": [asdict(fit) for fit in self.would_fit],
            "footprint": asdict(self.footprint),
            "not_runnable": list(self.not_runnable),
        }


def make_plan(spec: RunSpec, corpus: CorpusFacts | None = None) -> Plan:
    """Derive a plan.

    Args:
        spec: What is asked for.
        corpus: What is known of the data; None before it has been tokenised.

    Raises:
        PlanError: The spec asks for something impossible; the message names every such thing.
    """
    shape = find_shape(spec.model.source, spec.model.shape)
    topology = _topology(spec)
    problems = [
        *_resource_problems(spec),
        *_strategy_problems(spec, topology),
        *_method_problems(spec, topology),
        *_batch_problems(spec, topology),
        *_schedule_problems(spec),
        *_model_problems(spec, shape),
    ]
    if problems:
        raise PlanError("\n".join(problems))
    batch = BatchPlan(
        global_size=spec.batch.global_size,
        micro_size=spec.batch.micro_size,
        accumulation=spec.batch.global_size // (topology.world_size * spec.batch.micro_size),
        max_tokens=spec.batch.global_size * spec.data.sequence_tokens,
    )
    length = plan_length(spec, corpus.num_sequences if corpus else spec.data.num_samples)
    attention = attention_of(spec)
    world_size, inside = topology.world_size, topology.processes_per_node
    asked = spec
    spec = settled(spec, shape, world_size=world_size, gpus_per_node=inside, attention=attention)
    memory = plan_memory(
        spec, shape, world_size=world_size, gpus_per_node=inside, attention=attention
    )
    too_large = topology.device == "cuda" and memory.fits is False
    return Plan(
        spec=spec,
        shape=shape,
        topology=topology,
        batch=batch,
        length=length,
        corpus=corpus,
        num_trained_params=trained_params(spec, shape),
        memory=memory,
        would_fit=what_fits(asked, shape, attention=attention) if too_large else (),
        footprint=footprint(
            spec,
            shape,
            world_size=topology.world_size,
            gpus_per_node=inside,
            accumulation=batch.accumulation,
            steps=length.steps,
        ),
        not_runnable=_not_runnable(spec),
    )


def plan_length(spec: RunSpec, num_sequences: int | None) -> Length:
    """Steps, warm-up and epochs; the worker calls this again once the data is tokenised."""
    schedule, size = spec.schedule, spec.batch.global_size
    steps = schedule.steps
    if steps is None and num_sequences is not None:
        assert schedule.epochs is not None
        steps = max(1, math.ceil(schedule.epochs * num_sequences / size))
    warmup = schedule.warmup_steps
    if warmup is None and steps is not None:
        warmup = math.ceil((schedule.warmup_ratio or 0.0) * steps)
    epochs = schedule.epochs
    if epochs is None and steps is not None and num_sequences is not None:
        epochs = steps * size / num_sequences
    max_tokens = None if steps is None else steps * size * spec.data.sequence_tokens
    return Length(steps, warmup, num_sequences, epochs, max_tokens)


def _topology(spec: RunSpec) -> Topology:
    resources = spec.resources
    if resources.gpus_per_node:
        return Topology(resources.nodes, resources.gpus_per_node, "cuda")
    return Topology(resources.nodes, resources.processes_per_node or 1, "cpu")


def _resource_problems(spec: RunSpec) -> list[str]:
    resources = spec.resources
    problems = []
    if resources.gpus_per_node and resources.processes_per_node is not None:
        problems.append(
            f"resources.processes_per_node: is for runs without GPUs; with gpus_per_node="
            f"{resources.gpus_per_node} there is one process a GPU. Remove it, or set "
            "gpus_per_node: 0"
        )
    if resources.gpu is not None and gpu_bytes(resources.gpu) is None:
        near = difflib.get_close_matches(resources.gpu.lower(), GPU_MIB, n=1, cutoff=0.3)
        problems.append(
            f"resources.gpu: {resources.gpu!r} is not known; known: {', '.join(GPU_MIB)}; or a "
            f"memory size such as 24gib" + (f". Did you mean {near[0]}?" if near else "")
        )
    if resources.backend == "local" and resources.nodes > 1:
        problems.append(
            f"resources.nodes: {resources.nodes} nodes need backend: slurm; local is one machine"
        )
    return problems


def _strategy_problems(spec: RunSpec, topology: Topology) -> list[str]:
    kind, world_size = spec.strategy.kind, topology.world_size
    if kind == "single" and world_size != 1:
        return [f"strategy.kind: single is one process, and there are {world_size}; use ddp"]
    if kind in ("fsdp", *ZERO) and world_size == 1:
        return [f"strategy.kind: {kind} shards over several processes, and there is 1; use single"]
    if kind == "hsdp" and (topology.nodes == 1 or topology.processes_per_node == 1):
        return [
            "strategy.kind: hsdp shards inside a node and replicates across nodes; with "
            f"{topology.nodes} x {topology.processes_per_node} processes use "
            + ("fsdp" if world_size > 1 else "single")
        ]
    return []


def _method_problems(spec: RunSpec, topology: Topology) -> list[str]:
    """What is trained, and what it does not go together with."""
    full, problems = not isinstance(spec.adapter, LoraAdapter), []
    if full and spec.quantization.kind != "none":
        problems.append(
            "adapter.kind: none trains the weights themselves, which "
            f"{spec.quantization.kind} numbers cannot be; use quantization.kind=none, or "
            "adapter.kind=lora"
        )
    if full and spec.model.dtype == "fp32" and spec.adapter.dtype == "bf16":
        problems.append(
            "adapter.dtype: bf16 weights are computed with in bf16; use model.dtype=bf16"
        )
    cut = spec.strategy.shard_adapter is True
    if cut and (full or spec.strategy.kind not in SHARDED):
        what = "full fine-tuning has no adapter" if full else f"not with {spec.strategy.kind}"
        problems.append(
            f"strategy.shard_adapter: is for adapters under fsdp and hsdp, {what}; remove it"
        )
    rows = topology.world_size > 1 and cuts_trained(spec)
    if rows and spec.optimizer.kind.endswith("_8bit"):
        problems.append(
            f"optimizer.kind: {spec.optimizer.kind} shares constants between neighbouring rows, "
            "which sharding may part; use paged_adamw_32bit"
        )
    if spec.strategy.kind in ZERO:
        problems += _zero_problems(spec)
    return problems


def _zero_problems(spec: RunSpec) -> list[str]:
    """What DeepSpeed has, and a checkpoint could not be made of."""
    kind, problems = spec.strategy.kind, []
    if spec.optimizer.kind.endswith("_8bit"):
        problems.append(
            f"optimizer.kind: {spec.optimizer.kind} shares constants between neighbours, and "
            f"{kind} steps all weights as one row of numbers, cut anywhere; use paged_adamw_32bit"
        )
    if spec.adapter.dtype == "bf16":
        problems.append(
            f"adapter.dtype: {kind} steps float32 copies of what is trained; use adapter.dtype=fp32"
        )
    return problems


def _batch_problems(spec: RunSpec, topology: Topology) -> list[str]:
    size, micro = spec.batch.global_size, spec.batch.micro_size
    unit = topology.world_size * micro
    if size % unit == 0:
        return []
    lower, upper = size // unit * unit, (size // unit + 1) * unit
    neighbours = f"{lower} or {upper}" if lower else f"{upper}"
    return [
        f"batch.global_size: {size} sequences do not divide into {topology.world_size} processes x "
        f"{micro} (micro_size); use {neighbours}, or another micro_size"
    ]


def _schedule_problems(spec: RunSpec) -> list[str]:
    steps, warmup = spec.schedule.steps, spec.schedule.warmup_steps
    if steps is None or warmup is None or warmup < steps:
        return []
    return [
        f"schedule.warmup_steps: {warmup} of {steps} steps leave none at the full rate; use at "
        f"most {steps - 1}"
    ]


def _model_problems(spec: RunSpec, shape: ModelShape) -> list[str]:
    problems = []
    if spec.data.sequence_tokens > shape.max_positions:
        problems.append(
            f"data: sequences of up to {spec.data.sequence_tokens} tokens, and the model has "
            f"positions for {shape.max_positions}; use max_tokens: {shape.max_positions}"
        )
    if isinstance(spec.adapter, LoraAdapter) and spec.adapter.target != "all-linear":
        names = spec.adapter.target
        if len(set(names)) < len(names):
            problems.append(f"adapter.target: {', '.join(names)} names a layer twice")
        for name in names:
            if name not in shape.linears:
                near = difflib.get_close_matches(name, shape.linears, n=1)
                problems.append(
                    f"adapter.target: no linear layer is called {name!r}; there are "
                    f"{', '.join(shape.linears)}" + (f". Did you mean {near[0]}?" if near else "")
                )
    widths = {width for _, width in shape.linears.values()}
    if spec.quantization.kind == "nf4" and (odd := sorted(w for w in widths if w % NF4_BLOCK)):
        problems.append(
            f"quantization.kind: nf4 has blocks of {NF4_BLOCK} weights, which do not divide rows "
            f"of {', '.join(map(str, odd))}; use quantization.kind=none"
        )
    if spec.model.attention == "varlen" and not _has_varlen(spec):
        problems.append("model.attention: varlen needs a GPU and dtype bf16; use sdpa")
    if shape.num_heads % shape.num_kv_heads:
        problems.append(
            f"model.shape: {shape.num_heads} heads cannot share {shape.num_kv_heads} key-value "
            "heads; num_kv_heads must divide num_heads"
        )
    return problems


def attention_of(spec: RunSpec) -> str:
    """The attention kernel that a run uses."""
    if spec.model.attention != "auto":
        return spec.model.attention
    return "varlen" if spec.data.packing and _has_varlen(spec) else "sdpa"


def _has_varlen(spec: RunSpec) -> bool:
    return spec.resources.gpus_per_node > 0 and spec.model.dtype == "bf16"


def _not_runnable(spec: RunSpec) -> tuple[str, ...]:
    """What this machine lacks for the run."""
    if spec.strategy.kind in ZERO and importlib.util.find_spec("deepspeed") is None:
        return (
            f"strategy.kind: {spec.strategy.kind} needs DeepSpeed, which is not installed here: "
            'pip install "qlora-dist[deepspeed]", or use fsdp',
        )
    return ()
