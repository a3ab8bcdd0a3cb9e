"""Samples to tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlora_dist.data.tokens import Sample

IGNORE = -100  # torch's cross_entropy leaves out targets of this value


@dataclass(frozen=True)
class Batch:
    """One forward pass's worth of sequences.

    Attributes:
        input_ids: int64 of shape ``(rows, seq)``.
        attention_mask: int64 of shape ``(rows, seq)``, 1 on tokens and 0 on padding; None where
            nothing is padded.
        targets: int64 of shape ``(rows, seq - 1)``: the token that each position is to predict, or
            ``IGNORE``.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    targets: torch.Tensor


def make_batch(samples: Sequence[Sample], *, pad_id: int, device: torch.device) -> Batch:
    """Right-pad samples to one rectangle.

    Args:
        samples: At least one.
        pad_id: Token written into the padding; never learned, never attended to.
        device: Where the tensors go.
    """
    seq = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), seq), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(samples), seq), dtype=torch.int64)
    learned = torch.zeros((len(samples), seq), dtype=torch.bool)
    for row, sample in enumerate(samples):
        length = len(sample.ids)
        ids[row, :length] = torch.from_numpy(sample.ids)
        mask[row, :length] = 1
        learned[row, :length] = torch.from_numpy(sample.learned)
    targets = ids[:, 1:].masked_fill(~learned[:, 1:], IGNORE)
    padded = bool((mask == 0).any())
    return Batch(ids.to(device), mask.to(device) if padded else None, targets.to(device))


def num_targets(sample: Sample) -> int:
    """Tokens of a sample that the loss counts; the first has nothing to be predicted from."""
    return int(sample.learned[1:].sum())
