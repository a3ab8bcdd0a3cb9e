"""Attention over samples of many lengths in one row, by the FlashAttention kernel of torch."""

from typing import Any

import torch

from qlora_dist.errors import ModelError

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
    sliding_window: int | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
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
        sliding_window: Tokens that each token sees, itself counted; None: all before it.
        dropout: Must be 0.
        softcap: Must be None, as the kernel knows none.
        s_aux: Must be None.

    Returns:
        Shape ``(1, tokens, heads, head_dim)``, and no weights.

    Raises:
        ModelError: The model's attention is of a kind that this kernel does not compute.
    """
    if dropout or softcap is not None or s_aux is not None:
        raise ModelError("model.attention: varlen has no dropout, soft cap or sinks; use sdpa")
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
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
    )
    return out[None], None
