"""The base model on this process's device, quantised as the spec says."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_dist.errors import ModelError
from qlora_dist.hub import explain, read_token
from qlora_dist.plan import Plan
from qlora_dist.shapes import FAMILIES, shape_of_config
from qlora_dist.sizes import NF4_BLOCK
from qlora_dist.spec import Nf4Quantization, RunSpec
from qlora_dist.train.attention import VARLEN, register
from qlora_dist.train.base_files import find_files
from qlora_dist.train.fill import WHOLE, Filling, Share, Slot, fill
from qlora_dist.train.nf4 import Nf4Linear

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Everything that a loader reads beside the weights.
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class EmptyBase:
    """A base model without its weights.

    Attributes:
        model: On the meta device but for what it computes by itself.
        slots: Its parameters.
        dtype: Of those that are not quantised.
    """

    model: Any
    slots: Sequence[Slot]
    dtype: torch.dtype


def empty_base(
    spec: RunSpec, *, attention: str, share: Share = WHOLE, dtype: torch.dtype | None = None
) -> EmptyBase:
    """Build the base, frozen, in evaluation mode, with no memory for its weights.

    Args:
        spec: Names the model and its quantisation.
        attention: Name of the attention kernel.
        share: Which rows this process is going to hold.
        dtype: Of weights that are not quantised, if not ``model.dtype``.

    Returns:
        A transformers causal language model; its linear layers but the head are ``Nf4Linear`` under
        NF4.

    Raises:
        ModelError: It is missing or gated.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if attention == VARLEN:
        register()
    dtype = dtype or DTYPES[spec.model.dtype]
    try:
        config = AutoConfig.from_pretrained(**_origin(spec))
        # A base that was quantised before is filled like any other.
        config.__dict__.pop("quantization_config", None)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=spec.model.trust_remote_code,
            )
    except (OSError, ValueError, ImportError) as error:
        message = explain(error, kind="model", key="model.source", source=spec.model.source)
        raise ModelError(message) from error
    with contextlib.suppress(OSError):
        origin = _origin(spec)
        name = origin.pop("pretrained_model_name_or_path")
        model.generation_config = GenerationConfig.from_pretrained(name, **origin)
    model.tie_weights()
    if isinstance(spec.quantization, Nf4Quantization):
        _use_nf4(model, dtype, share, double=spec.quantization.double)
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    if spec.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return EmptyBase(model, _slots(model), dtype)


def put_whole(slot: Slot, rows: torch.Tensor) -> None:
    """Give a parameter all of its rows, wherever it is used."""
    old = slot.module._parameters[slot.name]
    parameter = nn.Parameter(rows, requires_grad=old is not None and old.requires_grad)
    for module, name in slot.places:
        module._parameters[name] = parameter


def fill_base(
    base: EmptyBase,
    spec: RunSpec,
    *,
    device: torch.device,
    folder: Path | None = None,
    share: Share = WHOLE,
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows,
    put: Callable[[Slot, torch.Tensor], None] = put_whole,
    sums: dict[str, torch.Tensor] | None = None,
    on_bytes: Callable[[int, int], None] = lambda *_: None,
    on_tensor: Callable[[], None] = lambda: None,
) -> None:
    """Give a base its weights.

    Args:
        base: The base.
        spec: Names the model and its quantisation.
        device: Where the weights go.
        folder: Where they are read, if not where the spec says.
        share: As in :class:`~qlora_dist.train.fill.Filling`.
        gather: The same.
        put: The same.
        sums: The same.
        on_bytes: The same.
        on_tensor: The same.

    Raises:
        ModelError: The files are missing, not this model's, or it does not fit.
        QLoRAError: Storage does not answer.
    """
    nf4 = spec.quantization if isinstance(spec.quantization, Nf4Quantization) else None
    filling = Filling(
        slots=base.slots,
        files=find_files(folder or base_folder(spec)),
        device=device,
        dtype=base.dtype,
        double=nf4 is not None and nf4.double,
        share=share,
        gather=gather,
        put=put,
        sums=sums,
        on_bytes=on_bytes,
        on_tensor=on_tensor,
    )
    try:
        fill(filling)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"model.source: {spec.model.source!r} does not fit on {device}: {error}"
        ) from error
    # What the model computes by itself, such as the angles of rotary embeddings.
    for module in base.model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def load_base(spec: RunSpec, *, device: torch.device, attention: str) -> Any:
    """Load the whole base, frozen, in evaluation mode.

    Args:
        spec: Names the model and its quantisation.
        device: Where it goes.
        attention: Name of the attention kernel.

    Raises:
        ModelError: It is missing, gated, or does not fit.
    """
    base = empty_base(spec, attention=attention)
    fill_base(base, spec, device=device)
    return base.model


def check_shape(base: Any, plan: Plan) -> None:
    """Compare the loaded model with the shape that the plan counted.

    Raises:
        ModelError: They differ.
    """
    config = base.config.to_dict()
    if config["model_type"] in FAMILIES:
        ours, real = plan.shape.model_dump(), shape_of_config(config).model_dump()
        wrong = [f"{k} is {real[k]}, planned {ours[k]}" for k in ours if real[k] != ours[k]]
    else:
        found = sum(m.in_features * m.out_features for _, m in linear_layers(base))
        planned = plan.shape.num_linear_params
        wrong = [f"{found:,} weights in linear layers, planned {planned:,}"] * (found != planned)
    if wrong:
        raise ModelError(
            f"model.source: {plan.spec.model.source!r} is not the shape that was planned: "
            f"{'; '.join(wrong)}. Mend model.shape"
        )


def linear_layers(base: Any) -> list[tuple[str, nn.Linear]]:
    """Every linear layer but the output head, with its full name, in the order of the model."""
    head = base.get_output_embeddings()
    return [
        (name, module)
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]


def quantised_layers(spec: RunSpec) -> frozenset[str]:
    """Full names of the layers that training quantises, found without loading a weight.

    Raises:
        ModelError: The base is missing or gated.
    """
    if not isinstance(spec.quantization, Nf4Quantization):
        return frozenset()
    model = empty_base(spec, attention="sdpa").model
    return frozenset(name for name, _ in linear_layers(model))


def base_folder(spec: RunSpec) -> Path:
    """The base's folder: local, or in the hub's cache, fetched if need be.

    Raises:
        ModelError: It is missing or gated.
    """
    path = Path(spec.model.source).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                spec.model.source,
                revision=spec.model.revision,
                allow_patterns=[*COMPANIONS, "*.safetensors"],
                # Second copies of the weights, which `qlora prefetch` leaves out too.
                ignore_patterns=["*/*", "consolidated*"],
                token=read_token(spec.model.token_file),
            )
        )
    except (OSError, ValueError) as error:
        message = explain(error, kind="model", key="model.source", source=spec.model.source)
        raise ModelError(message) from error


def _use_nf4(model: nn.Module, dtype: torch.dtype, share: Share, *, double: bool) -> None:
    """Put quantised layers in the place of all linear layers but the head."""
    for name, layer in linear_layers(model):
        if layer.in_features % NF4_BLOCK:
            raise ModelError(
                f"quantization.kind: {name} is {layer.in_features} wide, which is no multiple of "
                f"NF4's blocks of {NF4_BLOCK} weights; use quantization.kind=none"
            )
        parent, _, leaf = name.rpartition(".")
        rows = share.per_rank(layer.out_features) * share.size
        nf4 = Nf4Linear(layer, rows, dtype, double=double)
        setattr(model.get_submodule(parent), leaf, nf4)
    # What PEFT asks for before it takes its 4-bit layer.
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def _slots(model: nn.Module) -> list[Slot]:
    """Every parameter; one that is used in two places, such as a tied head, once."""
    places: dict[nn.Parameter, dict[str, tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, {})[f"{path}.{name}"] = (module, name)
    return [Slot(tuple(found), tuple(found.values())) for found in places.values()]


def _origin(spec: RunSpec) -> dict[str, Any]:
    """Where transformers finds the base, and what it may do to get it."""
    model = spec.model
    folder = Path(model.source).expanduser()
    return {
        "pretrained_model_name_or_path": str(folder) if folder.is_dir() else model.source,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "token": read_token(model.token_file),
    }
