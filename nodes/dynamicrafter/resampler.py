"""Image projector of DynamiCrafter: vision-tower tokens to context tokens, a group of queries for each frame.

A Perceiver resampler (Flamingo, arXiv 2204.14198) in the query-transformer form of DynamiCrafter (arXiv 2310.12190).
Tensor names end in their layout: B batch, N vision tokens, Q queries, W vision width, D inner width, C context width.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ResamplerParams:
    """Sizes of the Resampler, named as in the official YAML (`image_proj_stage_config`)."""

    dim: int
    depth: int
    dim_head: int
    heads: int
    num_queries: int     # per frame
    embedding_dim: int   # width of the vision tower
    output_dim: int      # width of the context
    ff_mult: int
    video_length: int    # frames with a group of queries


class PerceiverAttention(nn.Module):
    """Queries attend to the vision tokens and to each other."""

    def __init__(self, params: ResamplerParams, operations, attention, **factory):
        super().__init__()
        inner = params.dim_head * params.heads
        self.heads = params.heads
        self.attention = attention
        self.norm1 = operations.LayerNorm(params.dim, **factory)
        self.norm2 = operations.LayerNorm(params.dim, **factory)
        self.to_q = operations.Linear(params.dim, inner, bias=False, **factory)
        self.to_kv = operations.Linear(params.dim, inner * 2, bias=False, **factory)
        self.to_out = operations.Linear(inner, params.dim, bias=False, **factory)

    def forward(self, tokens_BND: Tensor, latents_BQD: Tensor) -> Tensor:
        tokens_BND, latents_BQD = self.norm1(tokens_BND), self.norm2(latents_BQD)
        k, v = self.to_kv(torch.cat((tokens_BND, latents_BQD), dim=1)).chunk(2, dim=-1)
        return self.to_out(self.attention(self.to_q(latents_BQD), k, v, self.heads))


class Resampler(nn.Module):
    """[B, N, embedding_dim] vision tokens -> [B, video_length * num_queries, output_dim] context tokens."""

    def __init__(self, params: ResamplerParams, operations, attention, **factory):
        super().__init__()
        queries = params.num_queries * params.video_length
        self.latents = nn.Parameter(torch.empty(1, queries, params.dim, **factory))
        self.proj_in = operations.Linear(params.embedding_dim, params.dim, **factory)
        self.proj_out = operations.Linear(params.dim, params.output_dim, **factory)
        self.norm_out = operations.LayerNorm(params.output_dim, **factory)
        self.layers = nn.ModuleList(
            nn.ModuleList((
                PerceiverAttention(params, operations, attention, **factory),
                nn.Sequential(
                    operations.LayerNorm(params.dim, **factory),
                    operations.Linear(params.dim, params.dim * params.ff_mult, bias=False, **factory),
                    nn.GELU(),
                    operations.Linear(params.dim * params.ff_mult, params.dim, bias=False, **factory),
                ),
            ))
            for _ in range(params.depth)
        )

    def forward(self, tokens_BNW: Tensor) -> Tensor:
        tokens_BND = self.proj_in(tokens_BNW)
        # The queries are a bare parameter: in ComfyUI they are cast here, as the layers of `operations` cast theirs.
        latents_BQD = self.latents.to(tokens_BND).expand(len(tokens_BND), -1, -1)
        for attend, feed_forward in self.layers:
            latents_BQD = latents_BQD + attend(tokens_BND, latents_BQD)
            latents_BQD = latents_BQD + feed_forward(latents_BQD)
        return self.norm_out(self.proj_out(latents_BQD))
