"""Samples to tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_dist.data.tokens import Sample

IGNORE = -100  # torch's cross_entropy leaves out targets of this value


@dataclass(frozen=True)
class Batch:
    """One forward pass's worth of sequences.

    Attributes:
        input_ids: int64 of shape ``(rows, seq)``.
        targets: int64 of shape ``(rows, seq - 1)``: the token that each position is to predict, or
            ``IGNORE``.
        model_inputs: What else the model is given, so that no sample sees another or the padding:
            a mask, positions, or the samples' bounds.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    model_inputs: dict[str, Any]


def make_batch(
    rows: Sequence[Sequence[Sample]], *, flat: bool, pad_id: int, device: torch.device
) -> Batch:
    """Lay sequences out as one batch.

    Args:
        rows: Sequences, each one or several samples; at least one.
        flat: All samples one after the other in a single row, for kernels that are told the bounds
            of samples; else a row a sequence, padded on the right to the longest.
        pad_id: Token written into the padding; never learned, never attended to.
        device: Where the tensors go.
    """
    if flat:
        return _flat([sample for row in rows for sample in row], device)
    if all(len(row) == 1 for row in rows):
        return _padded([row[0] for row in rows], pad_id, device)
    return _packed(rows, pad_id, device)


def _padded(samples: Sequence[Sample], pad_id: int, device: torch.device) -> Batch:
    """A sample a row, with a mask over the padding if there is any."""
    ids, targets = _rectangle([[sample] for sample in samples], pad_id)
    lengths = torch.tensor([len(sample.ids) for sample in samples])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    inputs = {} if bool(mask.all()) else {"attention_mask": mask.long().to(device)}
    return Batch(ids.to(device), targets.to(device), inputs)


def _packed(rows: Sequence[Sequence[Sample]], pad_id: int, device: torch.device) -> Batch:
    """Several samples a row, told apart by positions that restart at each.

    transformers makes of such positions, where there is neither a mask nor a cache, one that no
    sample sees past (masking_utils, find_packed_sequence_indices). Each token of padding is a
    sample of its own.
    """
    ids, targets = _rectangle(rows, pad_id)
    positions = torch.zeros_like(ids)
    for row, samples in enumerate(rows):
        places = torch.cat([torch.arange(len(sample.ids)) for sample in samples])
        positions[row, : len(places)] = places
    return Batch(
        ids.to(device),
        targets.to(device),
        {"position_ids": positions.to(device), "use_cache": False},
    )


def _flat(samples: Sequence[Sample], device: torch.device) -> Batch:
    ids, targets = _rectangle([samples], pad_id=0)
    lengths = torch.tensor([len(sample.ids) for sample in samples])
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).to(device)
    longest = int(lengths.max())
    positions = torch.cat([torch.arange(int(length)) for length in lengths])[None]
    inputs = {
        "position_ids": positions.to(device),
        # The names that transformers' own kernels take them by.
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return Batch(ids.to(device), targets.to(device), inputs)


def _rectangle(rows: Sequence[Sequence[Sample]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of shape ``(rows, seq)`` and targets of shape ``(rows, seq - 1)``, on the CPU."""
    seq = max(sum(len(sample.ids) for sample in row) for row in rows)
    ids = torch.full((len(rows), seq), pad_id, dtype=torch.int64)
    learned = torch.zeros((len(rows), seq), dtype=torch.bool)
    for row, samples in enumerate(rows):
        start = 0
        for sample in samples:
            end = start + len(sample.ids)
            ids[row, start:end] = torch.from_numpy(sample.ids)
            learned[row, start:end] = torch.from_numpy(sample.learned)
            # A sample's first token has nothing of its own before it to be predicted from.
            learned[row, start] = False
            start = end
    return ids, ids[:, 1:].masked_fill(~learned[:, 1:], IGNORE)
