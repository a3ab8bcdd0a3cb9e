"""The base model on this process's device, quantised as the spec says."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_dist.errors import ModelError
from qlora_dist.hub import explain, read_token
from qlora_dist.plan import Plan
from qlora_dist.shapes import FAMILIES, shape_of_config
from qlora_dist.spec import Nf4Quantization, RunSpec
from qlora_dist.train.attention import VARLEN, register

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_base(spec: RunSpec, *, device: torch.device, attention: str) -> Any:
    """Load the base, frozen, in evaluation mode.

    Args:
        spec: Names the model and its quantisation.
        device: Where it goes.
        attention: Name of the attention kernel.

    Returns:
        A transformers causal language model; its linear layers but the head are bitsandbytes'
        ``Linear4bit`` under NF4.

    Raises:
        ModelError: It is missing, gated, or does not fit.
    """
    from transformers import AutoModelForCausalLM

    if attention == VARLEN:
        register()
    model = spec.model
    try:
        base = AutoModelForCausalLM.from_pretrained(
            **_origin(spec),
            dtype=DTYPES[model.dtype],
            quantization_config=_quantization_config(spec),
            attn_implementation=attention,
            device_map={"": device},
            use_safetensors=True,
        )
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"model.source: {model.source!r} does not fit on {device}: {error}"
        ) from error
    except (OSError, ValueError, ImportError) as error:
        message = explain(error, kind="model", key="model.source", source=model.source)
        raise ModelError(message) from error
    base.requires_grad_(False)
    base.config.use_cache = False
    if model.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return base


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
    """Full names of the layers that ``load_base`` quantises, found without loading a weight.

    Raises:
        ModelError: The base is missing or gated.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if not isinstance(spec.quantization, Nf4Quantization):
        return frozenset()
    try:
        config = AutoConfig.from_pretrained(**_origin(spec))
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(
                config, trust_remote_code=spec.model.trust_remote_code
            )
    except (OSError, ValueError, ImportError) as error:
        message = explain(error, kind="model", key="model.source", source=spec.model.source)
        raise ModelError(message) from error
    return frozenset(name for name, _ in linear_layers(empty))


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


def _quantization_config(spec: RunSpec) -> Any:
    if not isinstance(spec.quantization, Nf4Quantization):
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=spec.quantization.double,
        bnb_4bit_compute_dtype=DTYPES[spec.model.dtype],
    )
