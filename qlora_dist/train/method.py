"""What of a model is trained: an adapter (:mod:`~qlora_dist.train.adapters`), or all of it."""

from typing import Any

import torch
from torch import nn

from qlora_dist.spec import LoraAdapter, RunSpec
from qlora_dist.train import pointwise
from qlora_dist.train.adapters import add_adapter, target_modules
from qlora_dist.train.load import DTYPES


def dtype_of_weights(spec: RunSpec) -> torch.dtype:
    """Dtype of the weights that are not quantised: of the computation, unless they are trained."""
    adapter = spec.adapter
    return DTYPES[spec.model.dtype if isinstance(adapter, LoraAdapter) else adapter.dtype]


def make_trainable(base: Any, spec: RunSpec, *, device: torch.device) -> tuple[Any, list[str]]:
    """Put an adapter around a base, or have its own weights trained.

    Args:
        base: A frozen base, whose weights may still be missing.
        spec: Says which.
        device: Where an adapter's weights go.

    Returns:
        The model in training mode, and the names of the layers that have an adapter.
    """
    autocast = spec.model.dtype == "bf16"
    if isinstance(spec.adapter, LoraAdapter):
        targets = target_modules(base, spec.adapter)
        model = add_adapter(base, spec.adapter, seed=spec.seed, device=device, autocast=autocast)
        return model.train(), targets
    base.requires_grad_(True)
    if autocast:
        pointwise.fuse(base)
        _compute_in_bf16(base)
    return base.train(), []


def _compute_in_bf16(base: Any) -> None:
    """Have activations in bf16 from the embedding on, where autocast leaves them as they come."""

    def cast(_: nn.Module, __: Any, out: torch.Tensor) -> torch.Tensor:
        return out.to(torch.bfloat16)

    base.get_input_embeddings().register_forward_hook(cast)
