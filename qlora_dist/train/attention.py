"""Attention over samples of many lengths in one row, by the FlashAttention kernel of torch."""

from typing import Any

import torch

VARLEN = "varlen"


def register() -> None:
    """Make ``attn_implementation="varlen"`` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(VARLEN, _attention)
    # The kernel is told the bounds of the samples, and needs no mask.
    AttentionMaskInterface.register(VARLEN, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each sample.

    Args:
        module: Unused; transformers passes it.
        query: Shape ``(1, heads, tokens, head_dim)``, bfloat16 or float16, on a GPU.
        key: Shape ``(1, kv_heads, tokens, head_dim)``.
        value: As ``key``.
        scaling: Factor of the scores.
        cu_seq_lens_q: Bounds of the samples, int32 of shape ``(samples + 1,)``.
        max_length_q: Tokens of the longest sample.

    Returns:
        Shape ``(1, tokens, heads, head_dim)``, and no weights.
    """
    from torch.nn.attention.varlen import varlen_attn

    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    out: Any = varlen_attn(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1, 0),
    )
    return out[None], None
