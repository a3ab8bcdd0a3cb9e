"""RunSpec: what a user asks for, in one YAML file.

Validators only check. Whatever follows from a spec (world size, bytes, steps) is in
``qlora_dist.plan``; how a file becomes one, and how its mistakes are explained, in
``qlora_dist.spec_file``.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from qlora_dist.shapes import ModelShape
from qlora_dist.spec_values import (
    LARGEST,
    Count,
    CountOrZero,
    EnvName,
    Fraction,
    Number,
    Positive,
    Section,
    Switch,
    Text,
    TimeLimit,
)

Learn = Literal["auto", "answer", "all"]
StrategyKind = Literal["single", "ddp", "fsdp", "hsdp", "zero2", "zero3"]
OptimizerKind = Literal["adamw", "paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit"]
FormatName = Literal["self-instruct", "oasst1", "input-output", "ptt"]


class ModelSection(Section):
    """The base model."""

    source: Text = Field(examples=["huggyllama/llama-7b"])
    """Folder with the model, or its name on the hub."""
    revision: Text | None = None
    """Commit, tag or branch on the hub; the newest if absent."""
    shape: Text | ModelShape | None = None
    """Name of a known shape, or a shape in full, where neither the table of hub names nor a local
    config.json tells it."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of the weights that are not quantised and of the computation."""
    attention: Literal["auto", "sdpa", "eager", "varlen"] = "auto"
    """Attention kernel. sdpa, eager: as transformers names them. varlen: torch's FlashAttention
    kernel for samples of many lengths in one row, without padding. auto: varlen for packed
    sequences on a GPU in bf16, else sdpa."""
    gradient_checkpointing: Switch = True
    """Keep only each layer's input in the forward pass and compute the rest again in the backward
    pass: less memory, about a third more work."""
    trust_remote_code: Switch = False
    """Run Python code that comes with the model. This is code execution: read the code first."""
    token_file: Text | None = None
    """File of mode 0600 that holds a hub token, for gated models. The token itself appears in no
    spec, command, log or snapshot."""


class Nf4Quantization(Section):
    """4-bit NormalFloat, as in the QLoRA paper (arXiv 2305.14314, section 3)."""

    kind: Literal["nf4"] = "nf4"
    """NF4 in blocks of 64 weights."""
    double: Switch = True
    """Quantise the quantisation constants too, which saves 0.37 bits a weight."""
    cache_dir: Text | None = None
    """A folder for quantised bases, on storage that all nodes share. The first run writes the base
    there in NF4, in the format that transformers loads, and every start after that reads a quarter
    of the bytes; see `qlora quantize`."""


class NoQuantization(Section):
    """The base stays in ``model.dtype``."""

    kind: Literal["none"] = "none"
    """No quantisation: plain LoRA."""


Quantization = Annotated[Nf4Quantization | NoQuantization, Field(discriminator="kind")]


class LoraAdapter(Section):
    """A low-rank adapter on the linear layers (PEFT's LoRA)."""

    kind: Literal["lora"] = "lora"
    """The method."""
    r: Count = 64
    """Rank."""
    alpha: Positive = 16.0
    """The adapter's product is scaled by alpha / r."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    target: Literal["all-linear"] | Annotated[list[Text], Field(min_length=1)] = "all-linear"
    """all-linear: every linear layer but the output head. Or names of layers, such as [q_proj,
    v_proj]."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the adapter's weights, gradients and optimizer moments."""


class NoAdapter(Section):
    """Full fine-tuning: all weights of the model are trained, and a run ends with a model."""

    kind: Literal["none"] = "none"
    """No adapter."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the trained weights, their gradients and optimizer moments. The computation is in
    ``model.dtype`` either way."""


def _lora_by_default(value: object) -> object:
    """What names no kind is a LoRA adapter."""
    return {"kind": "lora", **value} if isinstance(value, dict) else value


Adapter = Annotated[
    LoraAdapter | NoAdapter, Field(discriminator="kind"), BeforeValidator(_lora_by_default)
]


class DatasetSection(Section):
    """One dataset of a mix, and what of it is learned."""

    source: Text = Field(examples=["data/dialogs.jsonl"])
    """A .json, .jsonl, .csv, .tsv or .txt file, or a dataset's name on the hub."""
    format: FormatName = Field(examples=["oasst1"])
    """How a row becomes a prompt and an answer."""
    subset: Text | None = None
    """Configuration of a hub dataset."""
    split: Text = "train"
    """Split of a hub dataset."""
    revision: Text | None = None
    """Commit, tag or branch of a hub dataset."""
    template: Text | None = None
    """Text of the prompt with {source} where the row's own goes; the format's default if absent."""
    learn: Learn = "auto"
    """answer: only answers are learned. all: prompts too. auto: what the format's original recipe
    does (for oasst1 the whole conversation, for the rest the answer)."""
    weight: Annotated[int, Field(strict=True, ge=1, le=1000)] = 1
    """Times that each of its samples comes in an epoch."""

    @model_validator(mode="after")
    def _template_has_source(self) -> "DatasetSection":
        _check_template(self.template)
        return self


class DataSection(Section):
    """The corpus, and what of it is learned: one dataset, or a mix of several."""

    source: Text | None = Field(None, examples=["data/dialogs.jsonl"])
    """A .json, .jsonl, .csv, .tsv or .txt file, or a dataset's name on the hub."""
    format: FormatName | None = Field(None, examples=["oasst1"])
    """How a row becomes a prompt and an answer."""
    subset: Text | None = None
    """Configuration of a hub dataset."""
    split: Text = "train"
    """Split of a hub dataset."""
    revision: Text | None = None
    """Commit, tag or branch of a hub dataset."""
    template: Text | None = None
    """Text of the prompt with {source} where the row's own goes; the format's default if absent."""
    learn: Learn = "auto"
    """answer: only answers are learned. all: prompts too. auto: what the format's original recipe
    does (for oasst1 the whole conversation, for the rest the answer)."""
    mix: Annotated[list[DatasetSection], Field(min_length=1)] | None = None
    """Several datasets, instead of the keys above."""
    source_tokens: Count | None = None
    """Longest prompt, in tokens; longer ones lose their end. Goes with target_tokens."""
    target_tokens: Count | None = None
    """Longest answer with its end-of-sequence token, in tokens; longer ones lose their end."""
    max_tokens: Annotated[int, Field(strict=True, ge=2, le=LARGEST)] | None = None
    """One limit for prompt and answer together, instead of the two."""
    validation_rows: CountOrZero = 0
    """Rows split off for the evaluation loss; never trained on."""
    validation_seed: CountOrZero = 42
    """Seed of that split."""
    group_by_length: Switch = False
    """Batches of similar length, as the paper's recipe has it; the order stays a function of seed
    and epoch."""
    packing: Switch = False
    """Put several samples into one sequence, best fit first, up to the token limit; none sees
    another. Batch sizes then count such sequences."""
    store_dir: Text | None = None
    """Folder of the tokenised corpora, which runs share; a folder "corpora" beside the run if
    absent."""
    num_samples: Count | None = None
    """Training sequences, for a plan that cannot read the data."""

    @model_validator(mode="after")
    def _one_dataset_or_a_mix(self) -> "DataSection":
        fields = DataSection.model_fields
        own = {
            name
            for name in set(DatasetSection.model_fields) & set(fields)
            if getattr(self, name) != fields[name].default
        }
        if self.mix is not None and own:
            raise ValueError(
                f"mix lists the datasets; {', '.join(sorted(own))} goes into its entries"
            )
        missing = [name for name in ("source", "format") if getattr(self, name) is None]
        if self.mix is None and missing:
            example = {"source": "data/dialogs.jsonl", "format": "oasst1"}
            raise ValueError(
                f"{' and '.join(missing)} must be given; for example "
                + ", ".join(f"{name}: {example[name]}" for name in missing)
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_batch(self) -> "DataSection":
        if self.packing and self.group_by_length:
            raise ValueError(
                "packing fills every sequence, and leaves group_by_length no use; remove one"
            )
        return self

    @model_validator(mode="after")
    def _one_kind_of_limit(self) -> "DataSection":
        two = self.source_tokens is not None and self.target_tokens is not None
        any_of_two = self.source_tokens is not None or self.target_tokens is not None
        if two == (self.max_tokens is not None) or (any_of_two and not two):
            raise ValueError(
                "give either max_tokens, or source_tokens together with target_tokens; "
                "for example max_tokens: 512"
            )
        return self

    @model_validator(mode="after")
    def _template_has_source(self) -> "DataSection":
        _check_template(self.template)
        return self

    @property
    def datasets(self) -> tuple[DatasetSection, ...]:
        """The datasets in their order, one or several."""
        if self.mix is not None:
            return tuple(self.mix)
        names = set(DatasetSection.model_fields) & set(DataSection.model_fields)
        return (DatasetSection(**{name: getattr(self, name) for name in names}),)

    @property
    def sequence_tokens(self) -> int:
        """The longest sequence that the limits allow, in tokens."""
        if self.max_tokens is not None:
            return self.max_tokens
        assert self.source_tokens is not None
        assert self.target_tokens is not None
        return self.source_tokens + self.target_tokens


def _check_template(template: str | None) -> None:
    if template is not None and template.count("{source}") != 1:
        raise ValueError("template must contain {source} once; for example 'Q: {source}\\nA: '")


class OptimizerSection(Section):
    """AdamW."""

    kind: OptimizerKind = "paged_adamw_32bit"
    """adamw: torch's, fused on a GPU. The others are bitsandbytes': 8bit quantises the moments in
    blocks of 256, paged moments may be evicted to host memory."""
    lr: Positive = 2e-4
    """Peak learning rate."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.999
    """Decay of the second moment."""
    eps: Positive = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Positive | None = 0.3
    """Gradients are scaled down to this norm; null: never."""


class ScheduleSection(Section):
    """How long, and the learning rate over that time."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or falling to 0 in a line or in half a cosine."""
    warmup_ratio: Fraction | None = None
    """Part of all steps in which the rate rises in a line from 0."""
    warmup_steps: CountOrZero | None = None
    """The same in steps."""
    steps: Count | None = None
    """Optimizer steps."""
    epochs: Annotated[Number, Field(gt=0, le=1_000_000)] | None = None
    """Passes over the training samples, instead of steps."""

    @model_validator(mode="after")
    def _one_of_each(self) -> "ScheduleSection":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs; for example steps: 1875")
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError(
                "give either warmup_ratio or warmup_steps; for example warmup_steps: 10"
            )
        return self


class BatchSection(Section):
    """Batch sizes, in sequences."""

    global_size: Count = 16
    """Sequences in one optimizer step, over all processes."""
    micro_size: Count = 1
    """Sequences in one forward pass of one process."""


class StrategySection(Section):
    """How the model lies over the processes."""

    kind: StrategyKind = Field(examples=["ddp"])
    """single: one process. ddp: a whole model on each. fsdp: sharded over all. hsdp: sharded inside
    a node, a model on each. zero2: DeepSpeed, a whole model on each, gradients and moments shared
    out. zero3: DeepSpeed, sharded over all."""
    shard_adapter: Literal["auto"] | Switch = "auto"
    """Under fsdp and hsdp: cut the adapter's weights and gradients into rows too, as its moments
    are. It takes less memory, and more between the GPUs in each forward and backward pass. auto:
    where the run does not fit without; the first attempt settles it."""


class ResourcesSection(Section):
    """Where the run goes and what it takes there."""

    backend: Literal["local", "slurm", "allocation"] = "local"
    """local: this machine. slurm: a job. allocation: inside salloc."""
    nodes: Count = 1
    """Machines."""
    gpus_per_node: CountOrZero = 1
    """GPUs on each, one process a GPU; 0 for the CPU."""
    processes_per_node: Count | None = None
    """Processes on each machine where gpus_per_node is 0."""
    gpu: Text | None = None
    """GPU type, such as h100-80gb, or a memory size, such as 24gib."""
    cpus_per_process: Count | None = None
    """CPU threads of one process; by default the node's cores shared out evenly."""
    timeout_s: Count = 1800
    """Longest that a process may stay at one place, such as a micro-batch, a save or loading the
    model, in seconds. Where none gets on for so long, the stacks of all are written down, and the
    attempt ends."""
    time: TimeLimit | None = None
    """Time limit of a job, [days-]hours:minutes:seconds; the profile's if absent, else 24 hours."""
    profile: Text | None = None
    """Cluster profile: a name in slurm/clusters, or a YAML file."""
    pass_env: list[EnvName] = Field(default_factory=list)
    """Variables of your shell that the run's processes get beyond those that training reads anyway
    (docs/slurm.md): names, or patterns with an asterisk. One that holds a secret, such as HF_TOKEN,
    only by its own name."""


class CheckpointSection(Section):
    """What is kept of the run's state."""

    every_steps: Count = 100
    """Steps between two saves."""
    keep_last: Count = 2
    """Newest checkpoints that are kept."""
    keep_every: Count | None = None
    """Also keep those of every so many steps, for good."""
    keep_best: Switch = True
    """Also keep the one with the lowest evaluation loss."""


class TrackingSection(Section):
    """Where curves go besides metrics.jsonl, which is always written."""

    kind: Literal["none", "tensorboard"] = "none"
    """tensorboard: event files in RUN/tracking."""


class EvaluationSection(Section):
    """The evaluation loss during training."""

    every_steps: Count | None = None
    """Steps between two evaluations; null: before the first step and after the last."""
    max_rows: Count | None = None
    """Use only the first of the validation rows."""
    micro_size: Count = 1
    """Sequences in one forward pass of one process."""


class RunSpec(Section):
    """One run, whole."""

    spec_version: Literal[1] = 1
    """Version of this schema."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = Field(
        examples=["guanaco-7b"]
    )
    """Name of the run: letters, digits, '.', '_' and '-'."""
    run_dir: Text | None = None
    """Folder of the run; runs/NAME if absent."""
    seed: CountOrZero = 0
    """Seed of adapters, order and dropout."""
    deterministic: Switch = False
    """Use only kernels that give the same bits again on the same kind of GPU; some are slower. On a
    CPU all do."""
    model: ModelSection
    quantization: Quantization = Nf4Quantization()
    adapter: Adapter = LoraAdapter()
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection
    batch: BatchSection = BatchSection()
    strategy: StrategySection
    resources: ResourcesSection = ResourcesSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()
    evaluation: EvaluationSection = EvaluationSection()
