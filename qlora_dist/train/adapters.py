"""The trainable part: PEFT's LoRA on the base's linear layers."""

import hashlib
import math
from typing import Any

import torch
from torch import nn

from qlora_dist.errors import ModelError
from qlora_dist.spec import LoraAdapter
from qlora_dist.train import lora, pointwise
from qlora_dist.train.load import DTYPES, linear_layers


def target_modules(base: nn.Module, adapter: LoraAdapter) -> list[str]:
    """Names of the layers that get an adapter, as PEFT matches them (by the end of a name).

    Raises:
        ModelError: A name that the spec lists matches no linear layer.
    """
    layers = linear_layers(base)
    leaves = sorted({name.rpartition(".")[2] for name, _ in layers})
    if adapter.target == "all-linear":
        return leaves
    if unknown := sorted(set(adapter.target) - set(leaves)):
        raise ModelError(
            f"adapter.target: the model has no linear layer {', '.join(unknown)}; it has "
            + ", ".join(leaves)
        )
    return sorted(set(adapter.target))


def add_adapter(
    base: Any, adapter: LoraAdapter, *, seed: int, device: torch.device, autocast: bool = False
) -> Any:
    """Put a fresh adapter around the base, whose weights may still be missing.

    Its own weights are drawn on the CPU from the seed and each parameter's name, so that they are
    the same on every device and at every world size.

    Args:
        base: The base.
        adapter: What to put around it.
        seed: Of its start.
        device: Where its weights go.
        autocast: Whether forward passes will run under autocast, in bf16. It casts what a product
            needs: PEFT's own casts to the dtype of the weights would only be undone. Products, and
            what is between them, are then ours (qlora_dist.train.lora and pointwise). In float32
            all is PEFT's own, and training is that of a plain loop over PEFT, rounding for
            rounding.

    Returns:
        A ``PeftModel`` whose only trainable parameters are the adapter's, in ``adapter.dtype``.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    targets = target_modules(base, adapter)
    wanted = {name for name, _ in linear_layers(base) if name.rpartition(".")[2] in targets}
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    got = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A")
        for name, _ in model.named_modules()
        if name.endswith(".lora_A")
    }
    if odd := sorted(wanted ^ got):
        raise ModelError(f"adapter.target: PEFT adapts other layers than the plan: {odd[:3]}")
    for name, parameter in list(model.named_parameters()):
        if parameter.requires_grad:
            value = _initial(_saved_name(name), parameter.shape, seed=seed)
            path, _, own = name.rpartition(".")
            # PEFT puts it beside the base's weight, on the meta device if that is there.
            model.get_submodule(path)._parameters[own] = nn.Parameter(
                value.to(device, DTYPES[adapter.dtype])
            )
    if autocast:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = False
        lora.fuse(model)
        pointwise.fuse(model)
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by the name that PEFT saves them under, in the order of the model."""
    return {
        _saved_name(name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _saved_name(name: str) -> str:
    return name.replace(".default.", ".")


def _initial(name: str, shape: torch.Size, *, seed: int) -> torch.Tensor:
    """LoRA's start (arXiv 2106.09685, section 4.1): B is zero, A as torch starts a linear layer."""
    if ".lora_B." in name:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    value = torch.empty(shape)
    nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    return value
