"""Attention for networks outside ComfyUI, where ComfyUI's own function is not available."""
from __future__ import annotations

from torch import Tensor, nn


def torch_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **_) -> Tensor:
    """Softmax attention over [batch, L, heads * dim] by PyTorch's fused kernel, for training and tests."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return mixed.transpose(1, 2).flatten(-2)
