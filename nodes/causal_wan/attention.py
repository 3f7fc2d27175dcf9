"""Layers of the causal Wan transformer (Wan 2.1, arXiv 2503.20314; causal: CausVid, arXiv 2412.07772).

Tensor names end in their layout: B videos, F latent frames, L = F * rows * columns tokens, C channels, N context
tokens. An `attention(q, k, v, heads, mask=None)` function is injected; it takes and returns [batch, tokens, channels].
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .cache import KVCache, Placement
from .rope import Rotation, rotate

EPS = 1e-6


class ContextKeys(NamedTuple):
    """Keys and values [B, N, C] of one cross-attention layer; they depend only on the prompt."""

    text_k: Tensor
    text_v: Tensor
    image_k: Tensor | None  # I2V models only
    image_v: Tensor | None


@dataclass
class Step:
    """What the layers read during one forward pass."""

    modulation_BF6C: Tensor                 # from the timestep of each frame
    rotation: Rotation
    context: tuple[ContextKeys, ...]        # by layer
    mask_LL: Tensor | None                  # without a cache: True where a token may attend
    cache: KVCache | None
    placement: Placement | None
    sink_rotation: Rotation | None
    transformer_options: dict = field(default_factory=dict)


def modulate(x_BLC: Tensor, shift_BFC: Tensor, scale_BFC: Tensor) -> Tensor:
    """x * (1 + scale) + shift with one shift and scale per frame."""
    x_BFSC = x_BLC.unflatten(1, (shift_BFC.shape[1], -1))
    return torch.addcmul(shift_BFC[:, :, None], x_BFSC, 1 + scale_BFC[:, :, None]).flatten(1, 2)


def gate(x_BLC: Tensor, gate_BFC: Tensor) -> Tensor:
    return (x_BLC.unflatten(1, (gate_BFC.shape[1], -1)) * gate_BFC[:, :, None]).flatten(1, 2)


class Attention(nn.Module):
    """Common base of both attention types. `index`: layer number, which selects its keys."""

    def __init__(self, index: int, dim: int, heads: int, operations, attention, **factory):
        super().__init__()
        self.index = index
        self.heads = heads
        self.attention = attention
        self.q = operations.Linear(dim, dim, **factory)
        self.k = operations.Linear(dim, dim, **factory)
        self.v = operations.Linear(dim, dim, **factory)
        self.o = operations.Linear(dim, dim, **factory)
        self.norm_q = operations.RMSNorm(dim, eps=EPS, **factory)
        self.norm_k = operations.RMSNorm(dim, eps=EPS, **factory)


class SelfAttention(Attention):
    """Self-attention over the frames of this forward pass and, with a cache, the frames before it."""

    def forward(self, x_BLC: Tensor, step: Step) -> Tensor:
        query = rotate(self.norm_q(self.q(x_BLC)), step.rotation, self.heads)
        raw_key = self.norm_k(self.k(x_BLC))
        key, value = rotate(raw_key, step.rotation, self.heads), self.v(x_BLC)
        if step.cache is not None:
            key, value = step.cache.write(self.index, raw_key, key, value, step.placement, step.sink_rotation)
        out = self.attention(query, key, value, self.heads, mask=step.mask_LL,
                             transformer_options=step.transformer_options)
        return self.o(out)


class CrossAttention(Attention):
    """Attention to the text and, in I2V models, to the tokens of the start image; the results are added."""

    def __init__(self, index: int, dim: int, heads: int, i2v: bool, operations, attention, **factory):
        super().__init__(index, dim, heads, operations, attention, **factory)
        self.i2v = i2v
        if i2v:
            self.k_img = operations.Linear(dim, dim, **factory)
            self.v_img = operations.Linear(dim, dim, **factory)
            self.norm_k_img = operations.RMSNorm(dim, eps=EPS, **factory)

    def project(self, text_BNC: Tensor, image_BNC: Tensor | None) -> ContextKeys:
        text = self.norm_k(self.k(text_BNC)), self.v(text_BNC)
        if not self.i2v:
            return ContextKeys(*text, None, None)
        return ContextKeys(*text, self.norm_k_img(self.k_img(image_BNC)), self.v_img(image_BNC))

    def forward(self, x_BLC: Tensor, step: Step) -> Tensor:
        keys = step.context[self.index]
        options = {"transformer_options": step.transformer_options}
        query = self.norm_q(self.q(x_BLC))
        out = self.attention(query, keys.text_k, keys.text_v, self.heads, **options)
        if self.i2v:
            out = out + self.attention(query, keys.image_k, keys.image_v, self.heads, **options)
        return self.o(out)


class WanBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and last are modulated by the frame's timestep."""

    def __init__(self, index: int, dim: int, ffn_dim: int, heads: int, i2v: bool, operations, attention, **factory):
        super().__init__()
        layers = {"operations": operations, "attention": attention, **factory}
        self.norm1 = operations.LayerNorm(dim, eps=EPS, elementwise_affine=False, **factory)
        self.self_attn = SelfAttention(index, dim, heads, **layers)
        self.norm3 = operations.LayerNorm(dim, eps=EPS, **factory)
        self.cross_attn = CrossAttention(index, dim, heads, i2v, **layers)
        self.norm2 = operations.LayerNorm(dim, eps=EPS, elementwise_affine=False, **factory)
        self.ffn = nn.Sequential(operations.Linear(dim, ffn_dim, **factory), nn.GELU(approximate="tanh"),
                                 operations.Linear(ffn_dim, dim, **factory))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim, **factory) / dim ** 0.5)

    def forward(self, x_BLC: Tensor, step: Step) -> Tensor:
        e = (step.modulation_BF6C + self.modulation.to(step.modulation_BF6C)).unbind(2)
        x_BLC = x_BLC + gate(self.self_attn(modulate(self.norm1(x_BLC), e[0], e[1]), step), e[2])
        x_BLC = x_BLC + self.cross_attn(self.norm3(x_BLC), step)
        return x_BLC + gate(self.ffn(modulate(self.norm2(x_BLC), e[3], e[4])), e[5])


class Head(nn.Module):
    """Projects tokens to patches of the flow."""

    def __init__(self, dim: int, out_features: int, operations, **factory):
        super().__init__()
        self.norm = operations.LayerNorm(dim, eps=EPS, elementwise_affine=False, **factory)
        self.head = operations.Linear(dim, out_features, **factory)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim, **factory) / dim ** 0.5)

    def forward(self, x_BLC: Tensor, time_BFC: Tensor) -> Tensor:
        shift, scale = (time_BFC[:, :, None] + self.modulation.to(time_BFC)).unbind(2)
        return self.head(modulate(self.norm(x_BLC), shift, scale))


class ImageEmbedding(nn.Module):
    """Projects vision-tower tokens [B, N, image_dim] to the width of the transformer."""

    def __init__(self, image_dim: int, dim: int, operations, **factory):
        super().__init__()
        self.proj = nn.Sequential(
            operations.LayerNorm(image_dim, **factory), operations.Linear(image_dim, image_dim, **factory), nn.GELU(),
            operations.Linear(image_dim, dim, **factory), operations.LayerNorm(dim, **factory))

    def forward(self, tokens_BNW: Tensor) -> Tensor:
        return self.proj(tokens_BNW)
