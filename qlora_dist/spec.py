"""RunSpec: what a user asks for, in one YAML file.

Validators only check. Whatever follows from a spec (world size, bytes, steps) is in
``qlora_dist.plan``; reading a spec touches no file but its own.
"""

import difflib
import hashlib
import json
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from qlora_dist.errors import SpecError
from qlora_dist.shapes import ModelShape

# Strict, so that `true` is no count and "16" no number. Bounded, so that arithmetic on what a user
# gives stays arithmetic.
LARGEST = 2**40
Count = Annotated[int, Field(strict=True, ge=1, le=LARGEST)]
CountOrZero = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False, le=LARGEST)]
Positive = Annotated[Number, Field(gt=0)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Switch = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]

StrategyKind = Literal["single", "ddp", "fsdp", "hsdp", "zero2", "zero3"]
FormatName = Literal["self-instruct", "oasst1", "input-output", "ptt"]


class Section(BaseModel):
    """A frozen part of the spec; keys that it does not know are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


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
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel, as transformers names it."""
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


class DataSection(Section):
    """The corpus, and what of it is learned."""

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
    learn: Literal["auto", "answer", "all"] = "auto"
    """answer: only answers are learned. all: prompts too. auto: what the format's original recipe
    does (for oasst1 the whole conversation, for the rest the answer)."""
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
    num_samples: Count | None = None
    """Training samples, for a plan that cannot read the data."""

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
        if self.template is not None and self.template.count("{source}") != 1:
            raise ValueError("template must contain {source} once; for example 'Q: {source}\\nA: '")
        return self

    @property
    def sequence_tokens(self) -> int:
        """The longest sequence that the limits allow, in tokens."""
        if self.max_tokens is not None:
            return self.max_tokens
        assert self.source_tokens is not None
        assert self.target_tokens is not None
        return self.source_tokens + self.target_tokens


class OptimizerSection(Section):
    """AdamW."""

    kind: Literal["adamw", "paged_adamw_32bit"] = "paged_adamw_32bit"
    """adamw: torch's, fused on a GPU. paged_adamw_32bit: bitsandbytes', whose moments may be
    evicted to host memory."""
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
    epochs: Positive | None = None
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
    a node. zero2, zero3: DeepSpeed."""


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
    """Longest wait in a collective before the run ends, in seconds."""
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d{1,3}:\d\d:\d\d$")] | None = None
    """Time limit of a job, [days-]hours:minutes:seconds."""
    profile: Text | None = None
    """Cluster profile: a name in slurm/clusters, or a YAML file."""


class CheckpointSection(Section):
    """What is kept of the run's state."""

    every_steps: Count = 100
    """Steps between two saves."""
    keep_last: Count = 2
    """Newest checkpoints that are kept."""
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
    adapter: LoraAdapter = LoraAdapter()
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection
    batch: BatchSection = BatchSection()
    strategy: StrategySection
    resources: ResourcesSection = ResourcesSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()
    evaluation: EvaluationSection = EvaluationSection()

    def sha256(self) -> str:
        """Fingerprint of everything that decides the result; where it lies does not."""
        tree = self.model_dump(mode="json", exclude={"run_dir"})
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------
# Reading


class _Loader(yaml.SafeLoader):
    """YAML 1.1 less its traps.

    ``1e-4`` is a number, ``12:00:00`` is text and not a count in base 60, and a key that is given
    twice is an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_NUMBERS[0], re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _NUMBERS[1],
    re.compile(
        r"^[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.?[0-9]+[eE][-+]?[0-9]+|\.[0-9]+)$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, *, source: str) -> object:
    """Parse YAML text, safely.

    Raises:
        SpecError: The text is not YAML; the message has line and column.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise SpecError([f"not YAML: {message}"], source=source) from error
    except (ValueError, RecursionError, TypeError) as error:
        # PyYAML lets these out of odd scalars (dates) and of keys that cannot be hashed.
        raise SpecError([f"not YAML that makes a spec: {error}"], source=source) from error


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Read a spec from a YAML file.

    Args:
        path: The file.
        overrides: ``section.key=value`` each, the value in YAML; applied before validation.

    Raises:
        SpecError: The file cannot be read, or some keys are wrong; all of them are named.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError([_missing_file(Path(path))], source=str(path)) from None
    except (OSError, ValueError) as error:
        raise SpecError([f"cannot be read: {error}"], source=str(path)) from error
    tree = parse_yaml(text, source=str(path))
    return spec_from_tree(tree, overrides, source=str(path))


def spec_from_tree(
    tree: object, overrides: Sequence[str] = (), *, source: str = "the spec"
) -> RunSpec:
    """Validate a tree of plain values, such as YAML or JSON gives.

    Raises:
        SpecError: Some keys are wrong; all of them are named.
    """
    if not isinstance(tree, dict):
        raise SpecError(["a spec is a mapping with model:, data:, ... at the top"], source=source)
    problems: list[str] = []
    merged = dict(tree)
    for override in overrides:
        problem = _apply(merged, override)
        if problem:
            problems.append(problem)
    if problems:
        raise SpecError(problems, source=source)
    try:
        return RunSpec.model_validate(merged)
    except ValidationError as error:
        items = [item for item in error.errors(include_url=False) if not _other_member(item)]
        raise SpecError(list(dict.fromkeys(map(_describe, items))), source=source) from None
    except (RecursionError, OverflowError) as error:
        raise SpecError([f"too deep or too large: {error}"], source=source) from None


def _missing_file(path: Path) -> str:
    try:
        names = sorted(p.name for p in (path.parent or Path()).iterdir() if p.suffix == ".yaml")
    except OSError:
        names = []
    near = difflib.get_close_matches(path.name, names, n=1)
    return "no such file" + (f"; did you mean {path.parent / near[0]}?" if near else "")


def _apply(tree: dict[str, Any], override: str) -> str | None:
    """Set one ``section.key=value`` in ``tree``; return a problem, if there is one."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        return f"{override!r}: an override is section.key=value, for example optimizer.lr=1e-4"
    try:
        parsed = parse_yaml(value, source=key)
    except SpecError as error:
        return f"{key}: {error.problems[0]}"
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        child = node.get(name)
        # A copy, so that the caller's tree stays as it was; a scalar in the way is replaced and
        # then found by the validation.
        node[name] = dict(child) if isinstance(child, dict) else {}
        node = node[name]
    node[last] = parsed
    return None


# ------------------------------------------------------------------------------------------------
# Explaining what is wrong


def _other_member(item: Mapping[str, Any]) -> bool:
    """Whether an error is of a union's member that the value was not meant for."""
    wants_text = item["type"] in ("string_type", "literal_error")
    return wants_text and isinstance(item["input"], dict | list) and len(item["loc"]) > 2


def _path(item: Mapping[str, Any]) -> list[str | int]:
    """An error's location without the names that pydantic puts in for members of a union."""
    path: list[str | int] = []
    members: list[type[BaseModel]] = [RunSpec]
    for part in item["loc"]:
        fields = [section.model_fields[part] for section in members if part in section.model_fields]
        if isinstance(part, int) or fields:
            path.append(part)
            members = list(_sections_of(fields[0].annotation)) if fields else []
    if item["type"] == "extra_forbidden":
        path.append(item["loc"][-1])
    return path


def _describe(item: Mapping[str, Any]) -> str:
    """One line for one of pydantic's errors: dotted path, rule, value, and one that would work."""
    location = _path(item)
    path = ".".join(str(part) for part in location) or "the spec"
    kind, value = item["type"], item.get("input")
    if kind == "extra_forbidden":
        return f"{path}: no such key{_nearest(location)}"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return f"{path}.kind: say which; one of nf4, none"
    field = _field_at(location)
    if kind == "missing":
        example = _example(field)
        return f"{path}: is missing" + (f"; for example {example}" if example else "")
    message = item["msg"].removeprefix("Value error, ")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "should be a mapping"
    message = message[0].lower() + message[1:]
    if kind == "value_error":
        return f"{path}: {message}"
    plain = isinstance(value, str | int | float | bool | None)
    shown = repr(value) if plain else type(value).__name__
    example = _example(field)
    hint = f"; for example {example}" if example and kind != "literal_error" else ""
    return f"{path}: {message}, got {shown[:80]}{hint}"


def _nearest(location: Sequence[str | int]) -> str:
    section = _section_at(location[:-1])
    if section is None:
        return ""
    names = list(section.model_fields)
    near = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(names)}"


def _sections_of(annotation: object) -> Iterable[type[BaseModel]]:
    """The Section classes inside an annotation such as ``Annotated[A | B, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, Annotated):
        for part in get_args(annotation):
            yield from _sections_of(part)


def _section_at(location: Sequence[str | int]) -> type[BaseModel] | None:
    section: type[BaseModel] = RunSpec
    for part in location:
        field = section.model_fields.get(str(part))
        found = next(iter(_sections_of(field.annotation)), None) if field else None
        if found is None:
            return None
        section = found
    return section


def _field_at(location: Sequence[str | int]) -> FieldInfo | None:
    section = _section_at(location[:-1]) if location else None
    return section.model_fields.get(str(location[-1])) if section else None


def _example(field: FieldInfo | None) -> str | None:
    if field is None:
        return None
    if field.examples:
        return str(field.examples[0])
    if field.is_required():
        return None
    default = field.get_default(call_default_factory=False)
    if isinstance(default, str | int | float | bool):
        return str(default).lower() if isinstance(default, bool) else str(default)
    return None
