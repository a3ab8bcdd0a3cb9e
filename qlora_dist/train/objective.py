"""What is minimised."""

from typing import Any

import torch
from torch.nn import functional

from qlora_dist.train.batch import IGNORE, Batch


def summed_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Cross-entropy of the targets, summed, not averaged: the caller knows the global count.

    Args:
        model: A causal language model.
        batch: One forward pass.

    Returns:
        A float32 scalar with a gradient.
    """
    logits = model(input_ids=batch.input_ids, **batch.model_inputs).logits
    # The last position predicts what nobody has. float32: sums over a vocabulary lose too much in
    # bf16.
    return functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        batch.targets.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
    )
