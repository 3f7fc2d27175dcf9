"""Attention for networks outside ComfyUI, where its own function is not available, and over the frames of a clip."""
from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from .fused import products_for

SHORT = 32  # frames; products of such small matrices are faster than fused kernels, which are made for long sequences


def torch_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **_) -> Tensor:
    """Softmax attention over [batch, L, heads * dim] by PyTorch's fused kernel, for training and tests."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    mixed = nn.functional.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(1, 2).flatten(-2)


OVERRIDE = "optimized_attention_override"  # in `transformer_options`: another pack's attention, which must be called


def attend_over_time(q_BMC: Tensor, k_BMC: Tensor, v_BMC: Tensor, heads: int, frames: int, attention,
                     options: dict) -> Tensor:
    """Attention of every position of a clip to itself in all frames; M = frames * positions tokens, frame by frame.

    Short clips are mixed where they lie, by a Triton kernel or by products of strided matrices. Longer ones, all where
    another pack overrides the attention, and in training on a GPU (where clip by clip means many small kernels), are
    transposed for `attention`.
    """
    def by_position(x_BMC: Tensor) -> Tensor:
        """[B, positions, frames, C], without a copy"""
        return x_BMC.unflatten(1, (frames, -1)).transpose(1, 2)

    if frames > SHORT or OVERRIDE in options or q_BMC.is_cuda and torch.is_grad_enabled():
        clips = len(q_BMC)
        q, k, v = (by_position(x_BMC).flatten(0, 1) for x_BMC in (q_BMC, k_BMC, v_BMC))
        mixed = attention(q, k, v, heads, transformer_options=options)
        return mixed.unflatten(0, (clips, -1)).transpose(1, 2).flatten(1, 2)
    products = products_for(q_BMC)
    if products is not None and q_BMC.shape[-1] // heads <= products.MOST_CHANNELS:
        mixed_BMC = q_BMC.new_empty(q_BMC.shape)
        products.attend(by_position(q_BMC), by_position(mixed_BMC), [(by_position(k_BMC), by_position(v_BMC))], heads)
        return mixed_BMC

    def rows(x_MC: Tensor) -> Tensor:
        """[positions * heads, frames, channels of a head], without a copy unless the rows are views of longer ones"""
        return x_MC.reshape(frames, -1, x_MC.shape[-1] // heads).transpose(0, 1)

    mixed_BMC, unused = q_BMC.new_empty(q_BMC.shape), q_BMC.new_empty(1, 1, 1)
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


def attend_sources(q_NLC: Tensor, sources: Sequence[tuple[Tensor, Tensor]], heads: int, frames: int, attention,
                   options: dict) -> Tensor:
    """Attention of the tokens of each frame to several sources, the results added.

    sources: keys and values, those of a clip [B, S, C], which all its frames share, or of each frame [N, S, C]. Short
    ones are read by one Triton kernel, unless another pack overrides the attention.
    """
    products = None if OVERRIDE in options else products_for(q_NLC)
    if products is not None and len(sources) <= 2 and q_NLC.shape[-1] // heads <= products.MOST_CHANNELS and all(
            k.shape[1] <= products.MOST_KEYS for k, _ in sources):
        mixed_NLC, clips = q_NLC.new_empty(q_NLC.shape), len(q_NLC) // frames

        def by_frame(x: Tensor) -> Tensor:
            """[B, T, tokens, C], without a copy"""
            return x.unflatten(0, (clips, -1)).expand(-1, frames, -1, -1)

        products.attend(by_frame(q_NLC), by_frame(mixed_NLC), [(by_frame(k), by_frame(v)) for k, v in sources], heads)
        return mixed_NLC

    def mixed(k: Tensor, v: Tensor) -> Tensor:
        # All frames of a clip attend to the same keys: folded into one long sequence, the keys are not repeated.
        q = q_NLC.unflatten(0, (len(k), -1)).flatten(1, 2)
        return attention(q, k, v, heads, transformer_options=options).reshape(q_NLC.shape)

    return reduce(torch.add, (mixed(k, v) for k, v in sources))
