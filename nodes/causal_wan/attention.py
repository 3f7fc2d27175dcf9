"""Layers of the causal Wan transformer (Wan 2.1, arXiv 2503.20314; causal: CausVid, arXiv 2412.07772).

Tensor names end in their layout: B videos, F latent frames, L = F * rows * columns tokens, C channels, N context
tokens. An `attention(q, k, v, heads)` function is injected; it takes and returns [batch, tokens, channels].
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..common.fused import add, add_norm, by_frame, linear_gelu, norm_rotate, rotate, store
from .cache import LayerCache, Window

EPS = 1e-6


class ContextKeys(NamedTuple):
    """Keys and values [B, N, C] of one cross-attention layer; they depend only on the prompt."""

    text_k: Tensor
    text_v: Tensor
    image_k: Tensor | None  # I2V models only
    image_v: Tensor | None


class Reach(NamedTuple):
    """Consecutive tokens that attend to the same tokens."""

    queries: slice
    keys: tuple[slice, ...]


def reaches(mask_FF: Tensor, frame_tokens: int) -> tuple[Reach, ...]:
    """Which tokens attend to which, from a mask over frames [F, F] (True where the row's frame attends to the
    column's), with `frame_tokens` tokens a frame. Attention over these pieces computes the True entries only and needs
    no mask of all tokens. Where the keys of a piece are not consecutive they are copied, and kept for backward."""
    def runs(rows: Sequence) -> list[tuple[object, slice]]:
        found, start = [], 0
        for value, run in groupby(rows):
            end = start + frame_tokens * len(list(run))
            found.append((value, slice(start, end)))
            start = end
        return found

    return tuple(Reach(queries, tuple(keys for seen, keys in runs(row) if seen))
                 for row, queries in runs(mask_FF.tolist()))


@dataclass
class Step:
    """What all layers read during one forward pass."""

    modulation_BF6C: Tensor                 # from the timestep of each frame
    window: Window
    reaches: Sequence[Reach] = ()           # without a cache: which tokens attend to which; empty: all to all
    transformer_options: dict = field(default_factory=dict)


class Attention(nn.Module):
    """Common base of both attention types."""

    def __init__(self, dim: int, heads: int, operations, attention, **factory):
        super().__init__()
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

    def forward(self, x_BLC: Tensor, step: Step, cache: LayerCache | None) -> Tensor:
        window, heads = step.window, self.heads
        query = norm_rotate(self.q(x_BLC), self.norm_q, window.rotation_LP2, heads)
        key, value = self.k(x_BLC), self.v(x_BLC)
        if cache is None:
            key = norm_rotate(key, self.norm_k, window.rotation_LP2, heads)
        elif not isinstance(cache, LayerCache):  # of a training, where backward still needs what was there before
            key = self.norm_k(key)
            key, value = cache.extend(key, rotate(key, window.rotation_LP2, heads), value, window)
        else:
            if window.sink_frames_S is not None:
                frames = by_frame(self.norm_k(key), len(window.slots_F))[:, window.sink_frames_S]
                store(cache.sink_BKC, frames.flatten(1, 2), window.slots_F[window.sink_frames_S])
            key = norm_rotate(key, self.norm_k, window.rotation_LP2, heads, cache.keys_BKC, window.slots_F)
            value = store(cache.values_BKC, value, window.slots_F)
            key, value = key[:, :window.attended], value[:, :window.attended]
        options = {"transformer_options": step.transformer_options}
        if not step.reaches:
            return self.o(self.attention(query, key, value, heads, **options))

        def seen(x_BLC: Tensor, pieces: tuple[slice, ...]) -> Tensor:
            return x_BLC[:, pieces[0]] if len(pieces) == 1 else torch.cat([x_BLC[:, p] for p in pieces], dim=1)

        parts = [self.attention(query[:, queries], seen(key, keys), seen(value, keys), heads, **options)
                 for queries, keys in step.reaches]
        return self.o(torch.cat(parts, dim=1))


class CrossAttention(Attention):
    """Attention to the text and, in I2V models, to the tokens of the start image; the results are added."""

    def __init__(self, dim: int, heads: int, i2v: bool, operations, attention, **factory):
        super().__init__(dim, heads, operations, attention, **factory)
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

    def forward(self, x_BLC: Tensor, step: Step, keys: ContextKeys) -> Tensor:
        options = {"transformer_options": step.transformer_options}
        query = self.norm_q(self.q(x_BLC))
        out = self.attention(query, keys.text_k, keys.text_v, self.heads, **options)
        if self.i2v:
            out = out + self.attention(query, keys.image_k, keys.image_v, self.heads, **options)
        return self.o(out)


class WanBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and last are modulated by the frame's timestep."""

    def __init__(self, dim: int, ffn_dim: int, heads: int, i2v: bool, operations, attention, **factory):
        super().__init__()
        layers = {"operations": operations, "attention": attention, **factory}
        self.norm1 = operations.LayerNorm(dim, eps=EPS, elementwise_affine=False, **factory)
        self.self_attn = SelfAttention(dim, heads, **layers)
        self.norm3 = operations.LayerNorm(dim, eps=EPS, **factory)
        self.cross_attn = CrossAttention(dim, heads, i2v, **layers)
        self.norm2 = operations.LayerNorm(dim, eps=EPS, elementwise_affine=False, **factory)
        self.ffn = nn.Sequential(operations.Linear(dim, ffn_dim, **factory), nn.GELU(approximate="tanh"),
                                 operations.Linear(ffn_dim, dim, **factory))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim, **factory) / dim ** 0.5)

    def forward(self, x_BLC: Tensor, step: Step, keys: ContextKeys, cache: LayerCache | None) -> Tensor:
        e = (step.modulation_BF6C + self.modulation.to(step.modulation_BF6C)).unbind(2)
        x_BLC, normed_BLC = add_norm(x_BLC, None, None, self.norm1, e[1], e[0])
        x_BLC, normed_BLC = add_norm(x_BLC, self.self_attn(normed_BLC, step, cache), e[2], self.norm3)
        x_BLC, normed_BLC = add_norm(x_BLC, self.cross_attn(normed_BLC, step, keys), None, self.norm2, e[4], e[3])
        return add(x_BLC, self.ffn[-1](linear_gelu(normed_BLC, self.ffn[0])), e[5])


class Head(nn.Module):
    """Projects tokens to patches of the flow."""

    def __init__(self, dim: int, out_features: int, operations, **factory):
        super().__init__()
        self.norm = operations.LayerNorm(dim, eps=EPS, elementwise_affine=False, **factory)
        self.head = operations.Linear(dim, out_features, **factory)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim, **factory) / dim ** 0.5)

    def forward(self, x_BLC: Tensor, time_BFC: Tensor) -> Tensor:
        shift, scale = (time_BFC[:, :, None] + self.modulation.to(time_BFC)).unbind(2)
        return self.head(add_norm(x_BLC, None, None, self.norm, scale, shift)[1])


class ImageEmbedding(nn.Module):
    """Projects vision-tower tokens [B, N, image_dim] to the width of the transformer."""

    def __init__(self, image_dim: int, dim: int, operations, **factory):
        super().__init__()
        self.proj = nn.Sequential(
            operations.LayerNorm(image_dim, **factory), operations.Linear(image_dim, image_dim, **factory), nn.GELU(),
            operations.Linear(image_dim, dim, **factory), operations.LayerNorm(dim, **factory))

    def forward(self, tokens_BNW: Tensor) -> Tensor:
        return self.proj(tokens_BNW)
