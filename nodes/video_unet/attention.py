"""The three attentions of the video U-Net: within a frame, to the text, and along time.

Tensor names end in their layout: B clips, T frames, N = B * T frames folded into the batch, C channels, H height,
W width, L tokens, M = T * H * W tokens of a clip, E embedding. On a GPU activations are channels-last. An
`attention(q, k, v, heads)` function is injected; it takes and returns [batch, L, C].
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..common.attention import attend_over_time, attend_sources
from ..common.embedding import sinusoids
from ..common.fused import project
from ..common.patches import attend_frame, is_patched, mix, patch_inputs, patch_tokens


@dataclass
class Step:
    """What the layers of the U-Net may read during one forward pass."""

    frames: int                                  # T
    emb_NE: Tensor                               # timestep and additional conditions
    text_BLC: Tensor
    transformer_options: dict                    # of this forward pass only; see common/patches.py


def tokens_of(x_NCHW: Tensor) -> Tensor:
    """[N, H * W, C]"""
    return x_NCHW.permute(0, 2, 3, 1).flatten(1, 2)


def image_of(x_NLC: Tensor, like_NCHW: Tensor) -> Tensor:
    """Tokens as an image of the size of another."""
    return x_NLC.unflatten(1, like_NCHW.shape[2:]).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Pre-norm attention with a residual; keys from the same tokens, or from a context `context_dim` wide."""

    def __init__(self, channels: int, head_channels: int, operations, attention, context_dim: int | None = None,
                 **factory):
        super().__init__()
        self.heads = channels // head_channels
        self.attention = attention
        self.norm = operations.LayerNorm(channels, **factory)
        self.to_q = operations.Linear(channels, channels, bias=False, **factory)
        self.to_k = operations.Linear(context_dim or channels, channels, bias=False, **factory)
        self.to_v = operations.Linear(context_dim or channels, channels, bias=False, **factory)
        self.to_out = operations.Linear(channels, channels, **factory)


class SpatialAttention(Attention):
    """Each position of a frame attends to the whole frame."""

    def forward(self, x_NCHW: Tensor, step: Step) -> Tensor:
        x_NLC = tokens_of(x_NCHW)
        x_NLC = x_NLC + attend_frame(self.norm(x_NLC), self, step.transformer_options)
        return image_of(x_NLC, x_NCHW)


class TextAttention(Attention):
    """Each position of each frame attends to the text."""

    def forward(self, x_NCHW: Tensor, step: Step) -> Tensor:
        options = step.transformer_options
        x_NLC = patch_tokens("middle_patch", tokens_of(x_NCHW), self, options)
        if is_patched("attn2", options):  # the functions expect a text for each image
            text_NLC = step.text_BLC.repeat_interleave(step.frames, dim=0)
            queries, keys, values = patch_inputs("attn2", self.norm(x_NLC), text_NLC, self, options)
            mixed = self.to_out(mix("attn2", self.to_q(queries), self.to_k(keys), self.to_v(values), self, options))
        else:
            text = self.to_k(step.text_BLC), self.to_v(step.text_BLC)
            mixed = self.to_out(attend_sources(self.to_q(self.norm(x_NLC)), [text], self.heads, step.frames,
                                               self.attention, options))
        x_NLC = patch_tokens("attn2_output_patch", mixed, self, options) + x_NLC
        return image_of(x_NLC, x_NCHW)


class TemporalAttention(Attention):
    """Each position attends to itself in all frames. Sinusoidal embeddings mark the frames, for any number of them."""

    def forward(self, x_NCHW: Tensor, step: Step) -> Tensor:
        x_NLC = tokens_of(x_NCHW)
        positions_TC = sinusoids(torch.arange(step.frames, device=x_NLC.device), x_NLC.shape[-1]).to(x_NLC.dtype)
        tokens_BTLC = self.norm(x_NLC).unflatten(0, (-1, step.frames)) + positions_TC[:, None]
        tokens_BMC = tokens_BTLC.flatten(1, 2)
        mixed_BMC = attend_over_time(*project(tokens_BMC, (self.to_q, self.to_k, self.to_v)), self.heads, step.frames,
                                     self.attention, step.transformer_options)
        return image_of(x_NLC + self.to_out(mixed_BMC).reshape(x_NLC.shape), x_NCHW)
