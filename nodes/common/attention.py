"""Attention for networks outside ComfyUI, where its own function is not available, and over the frames of a clip."""
from __future__ import annotations

import torch
from torch import Tensor, nn

SHORT = 32  # frames; products of such small matrices are faster than fused kernels, which are made for long sequences


def torch_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **_) -> Tensor:
    """Softmax attention over [batch, L, heads * dim] by PyTorch's fused kernel, for training and tests."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return mixed.transpose(1, 2).flatten(-2)


def attend_over_time(q_BMC: Tensor, k_BMC: Tensor, v_BMC: Tensor, heads: int, frames: int, attention,
                     options: dict) -> Tensor:
    """Attention of every position of a clip to itself in all frames; M = frames * positions tokens, frame by frame.

    Short clips are mixed where they lie, by products of strided matrices. Longer ones, and all where another pack
    overrides the attention, are transposed for `attention`.
    """
    if frames > SHORT or "optimized_attention_override" in options:
        clips = len(q_BMC)
        q, k, v = (x.unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1) for x in (q_BMC, k_BMC, v_BMC))
        mixed = attention(q, k, v, heads, transformer_options=options)
        return mixed.unflatten(0, (clips, -1)).transpose(1, 2).flatten(1, 2)
    def rows(x_MC: Tensor) -> Tensor:
        """[positions * heads, frames, channels of a head], without a copy"""
        return x_MC.view(frames, -1, x_MC.shape[-1] // heads).transpose(0, 1)

    mixed_BMC, unused = torch.empty_like(q_BMC), q_BMC.new_empty(1, 1, 1)
    in_place = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    parts = []
    for q_MC, k_MC, v_MC, out_MC in zip(q_BMC, k_BMC, v_BMC, mixed_BMC):
        q, k, v = rows(q_MC), rows(k_MC), rows(v_MC)
        # Scaled inside the product, whose sums are in float32: unscaled scores may overflow float16.
        scores = torch.baddbmm(unused, q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
        weights = scores.softmax(dim=-1)
        if not in_place:
            parts.append(torch.bmm(weights, v).transpose(0, 1).reshape(q_MC.shape))
        elif q_BMC.is_cpu:  # whose products are slow where the result is not in one piece
            rows(out_MC).copy_(torch.bmm(weights, v))
        else:
            torch.bmm(weights, v, out=rows(out_MC))
    return mixed_BMC if in_place else torch.stack(parts)
