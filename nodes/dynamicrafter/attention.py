"""Attention blocks of the DynamiCrafter U-Net (arXiv 2310.12190).

Tensor names end in their layout: B clips, T frames, N = B * T frames folded into the batch, C channels, H height,
W width, L tokens, M = T * H * W tokens of a clip. On a GPU activations are channels-last in memory, so that images and
tokens are views of each other. An `attention(q, k, v, heads)` function is injected; it takes and returns
[batch, L, heads * dim].
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..common.attention import attend_over_time, attend_sources
from ..common.fused import add_norm, geglu, group_norm, project
from ..common.patches import attend_frame, has_functions, is_patched, mix, patch_inputs, patch_tokens


class ContextKeys(NamedTuple):
    """Keys and values of one cross-attention layer; they do not change during a sampling run."""

    text_k: Tensor   # [B, L, C]
    text_v: Tensor
    image_k: Tensor  # [N, queries, C]
    image_v: Tensor


@dataclass
class Step:
    """What the layers of the U-Net may read during one forward pass."""

    frames: int                                    # T
    emb_NE: Tensor                                 # time and frame-stride embedding
    text_BLC: Tensor
    context: tuple[ContextKeys, ...]               # by cross-attention layer
    transformer_options: dict                      # of this forward pass only; see common/patches.py
    skip_size: tuple[int, int] = (0, 0)            # height and width of the skip that the next output block takes


class SelfAttention(nn.Module):
    """Projections of an attention among tokens."""

    def __init__(self, width: int, heads: int, head_dim: int, operations, attention, **factory):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.attention = attention
        self.to_q = operations.Linear(width, inner, bias=False, **factory)
        self.to_k = operations.Linear(width, inner, bias=False, **factory)
        self.to_v = operations.Linear(width, inner, bias=False, **factory)
        self.to_out = nn.Sequential(operations.Linear(inner, width, **factory))


class TemporalAttention(SelfAttention):
    """Self-attention of each position along time."""

    def forward(self, x_BMC: Tensor, step: Step) -> Tensor:
        mixed_BMC = attend_over_time(*project(x_BMC, (self.to_q, self.to_k, self.to_v)), self.heads, step.frames,
                                     self.attention, step.transformer_options)
        return self.to_out(mixed_BMC)


class FrameAttention(SelfAttention):
    """Self-attention within a frame, which ComfyUI's nodes may patch."""

    def forward(self, x_NLC: Tensor, step: Step) -> Tensor:
        return attend_frame(x_NLC, self, step.transformer_options)


class ImageTextAttention(nn.Module):
    """Dual cross-attention: one query, two sources, the results added.

    Text keys are shared by all frames of a clip; each frame has its own image keys. `alpha` (256 model only)
    scales the image branch by 1 + tanh(alpha).
    """

    number: int  # among the network's cross-attentions

    def __init__(self, width: int, context_dim: int, heads: int, head_dim: int, learnable_scale: bool,
                 operations, attention, **factory):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.attention = attention
        self.to_q = operations.Linear(width, inner, bias=False, **factory)
        self.to_k = operations.Linear(context_dim, inner, bias=False, **factory)
        self.to_v = operations.Linear(context_dim, inner, bias=False, **factory)
        self.to_k_ip = operations.Linear(context_dim, inner, bias=False, **factory)
        self.to_v_ip = operations.Linear(context_dim, inner, bias=False, **factory)
        self.to_out = nn.Sequential(operations.Linear(inner, width, **factory))
        self.alpha = nn.Parameter(torch.zeros((), **factory)) if learnable_scale else None

    def project(self, text_BLC: Tensor, image_NQC: Tensor) -> ContextKeys:
        return ContextKeys(self.to_k(text_BLC), self.to_v(text_BLC), self.to_k_ip(image_NQC), self.to_v_ip(image_NQC))

    def forward(self, x_NLC: Tensor, step: Step) -> Tensor:
        keys, options = step.context[self.number], step.transformer_options
        text, image = (keys.text_k, keys.text_v), (keys.image_k, keys.image_v)
        if self.alpha is not None:
            image = keys.image_k, keys.image_v * (1 + torch.tanh(self.alpha.to(keys.image_v)))

        def attend(q_NLC: Tensor, *sources: tuple[Tensor, Tensor]) -> Tensor:
            return attend_sources(q_NLC, sources, self.heads, step.frames, self.attention, options)

        if is_patched("attn2", options):  # the functions expect a text for each image
            text_NLC = step.text_BLC.repeat_interleave(step.frames, dim=0)
            x_NLC, text_NLC, value_NLC = patch_inputs("attn2", x_NLC, text_NLC, self, options)
            q_NLC = self.to_q(x_NLC)
            mixed = mix("attn2", q_NLC, self.to_k(text_NLC), self.to_v(value_NLC), self, options) + attend(q_NLC, image)
        else:
            mixed = attend(self.to_q(x_NLC), text, image)
        return patch_tokens("attn2_output_patch", self.to_out(mixed), self, options)


class GatedGELU(nn.Module):
    def __init__(self, width: int, inner: int, operations, **factory):
        super().__init__()
        self.proj = operations.Linear(width, inner * 2, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return geglu(x, self.proj)


class FeedForward(nn.Module):
    def __init__(self, width: int, operations, **factory):
        super().__init__()
        # The identity replaces the official dropout, which keeps the published key `net.2`.
        self.net = nn.Sequential(GatedGELU(width, width * 4, operations, **factory), nn.Identity(),
                                 operations.Linear(width * 4, width, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, a second attention (given), feed-forward; each with a pre-norm and a residual."""

    def __init__(self, width: int, attn1: nn.Module, attn2: nn.Module, operations, **factory):
        super().__init__()
        self.attn1 = attn1
        self.attn2 = attn2
        self.ff = FeedForward(width, operations, **factory)
        self.norm1 = operations.LayerNorm(width, **factory)
        self.norm2 = operations.LayerNorm(width, **factory)
        self.norm3 = operations.LayerNorm(width, **factory)

    def forward(self, x_BLC: Tensor, step: Step) -> Tensor:
        x_BLC, normed_BLC = self.middle(x_BLC, self.attn1(self.norm1(x_BLC), step), step)
        x_BLC, normed_BLC = add_norm(x_BLC, self.attn2(normed_BLC, step), None, self.norm3)
        return x_BLC + self.ff(normed_BLC)

    def middle(self, x_BLC: Tensor, branch_BLC: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Tokens between the first attention and the second, and their norm."""
        return add_norm(x_BLC, branch_BLC, None, self.norm2)


class SpatialBlock(TransformerBlock):
    def middle(self, x_NLC: Tensor, branch_NLC: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        options = step.transformer_options
        if not has_functions("middle_patch", options):
            return super().middle(x_NLC, branch_NLC, step)
        x_NLC = patch_tokens("middle_patch", x_NLC + branch_NLC, self.attn1, options)
        return x_NLC, self.norm2(x_NLC)


class SpatialTransformer(nn.Module):
    """Within a frame: self-attention over H * W, then cross-attention to text and image."""

    def __init__(self, channels: int, heads: int, head_dim: int, depth: int, context_dim: int, learnable_scale: bool,
                 operations, attention, **factory):
        super().__init__()
        inner = heads * head_dim
        layers = {"operations": operations, "attention": attention, **factory}
        self.norm = operations.GroupNorm(32, channels, eps=1e-6, **factory)
        self.proj_in = operations.Linear(channels, inner, **factory)
        self.transformer_blocks = nn.ModuleList(
            SpatialBlock(inner, FrameAttention(inner, heads, head_dim, **layers),
                         ImageTextAttention(inner, context_dim, heads, head_dim, learnable_scale, **layers),
                         operations, **factory)
            for _ in range(depth)
        )
        self.proj_out = operations.Linear(inner, channels, **factory)

    def forward(self, x_NCHW: Tensor, step: Step) -> Tensor:
        height, options = x_NCHW.shape[-2], step.transformer_options
        options["activations_shape"] = list(x_NCHW.shape)
        h_NLC = self.proj_in(group_norm(x_NCHW, self.norm, silu=False).permute(0, 2, 3, 1).flatten(1, 2))
        for index, block in enumerate(self.transformer_blocks):
            options["block_index"] = index
            h_NLC = block(h_NLC, step)
        options["transformer_index"] += 1
        return x_NCHW + self.proj_out(h_NLC).unflatten(1, (height, -1)).permute(0, 3, 1, 2)


def point_conv_class(conv1d: type[nn.Conv1d]) -> type[nn.Conv1d]:
    """A Conv1d with a kernel of one, over tokens [B, L, C]: a linear layer with the weights of a convolution."""

    class PointConv1d(conv1d):
        def _conv_forward(self, x_BLC: Tensor, weight: Tensor, bias: Tensor | None, *_args, **_kwargs) -> Tensor:
            return nn.functional.linear(x_BLC, weight[..., 0], bias)

    return PointConv1d


class TemporalTransformer(nn.Module):
    """Across frames: every pixel position attends to itself over time, twice. There are no position embeddings:
    the order comes from the temporal convolutions, so the layer takes any number of frames.
    The published `init_attn` projects by Conv1d (`conv_projection`), all others by Linear.
    """

    def __init__(self, channels: int, heads: int, head_dim: int, depth: int, conv_projection: bool,
                 operations, attention, **factory):
        super().__init__()
        inner = heads * head_dim
        layers = {"operations": operations, "attention": attention, **factory}
        self.norm = operations.GroupNorm(32, channels, eps=1e-6, **factory)
        if conv_projection:
            conv = point_conv_class(operations.Conv1d)
            self.proj_in = conv(channels, inner, 1, **factory)
            self.proj_out = conv(inner, channels, 1, **factory)
        else:
            self.proj_in = operations.Linear(channels, inner, **factory)
            self.proj_out = operations.Linear(inner, channels, **factory)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(inner, TemporalAttention(inner, heads, head_dim, **layers),
                             TemporalAttention(inner, heads, head_dim, **layers), operations, **factory)
            for _ in range(depth)
        )

    def forward(self, x_NCHW: Tensor, step: Step) -> Tensor:
        x_BCTHW = x_NCHW.unflatten(0, (-1, step.frames)).transpose(1, 2)
        # The norm's statistics are joint over all frames of a clip.
        h_BMC = self.proj_in(group_norm(x_BCTHW, self.norm, silu=False).permute(0, 2, 3, 4, 1).flatten(1, 3))
        for block in self.transformer_blocks:
            h_BMC = block(h_BMC, step)
        h_NHWC = self.proj_out(h_BMC).reshape(len(x_NCHW), *x_NCHW.shape[2:], -1)
        return x_NCHW + h_NHWC.permute(0, 3, 1, 2)
