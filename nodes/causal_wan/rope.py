"""Rotary position embedding of Wan over frame, row and column (RoFormer, arXiv 2104.09864).

Angles are computed in float64 from absolute indices, so there is no table that a long video could outgrow.
Layouts: L tokens (frame, row, column, in this order), P pairs of channels of one head.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10000.0


class Rotation(NamedTuple):
    """Cosines and sines [L, P] in float32."""

    cos_LP: Tensor
    sin_LP: Tensor


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Channel pairs of a head rotated by frame, row and column: 22, 21, 21 of 64."""
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


def make_rotation(frames: Sequence[int], height: int, width: int, head_dim: int, device=None) -> Rotation:
    """Rotation of the tokens of the latent frames with the given absolute indices, height x width tokens each."""
    sizes = (len(frames), height, width)
    positions = (torch.tensor(list(frames), dtype=torch.float64), torch.arange(height), torch.arange(width))
    cosines, sines = [], []
    for axis, (pairs, position) in enumerate(zip(axis_pairs(head_dim), positions)):
        frequency = THETA ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        angle = position.double()[:, None] * frequency
        shape = [1, 1, 1, pairs]
        shape[axis] = sizes[axis]
        for parts, table in ((cosines, angle.cos()), (sines, angle.sin())):
            parts.append(table.to(device, torch.float32).view(shape).expand(*sizes, pairs))
    return Rotation(*(torch.cat(parts, dim=-1).flatten(0, 2) for parts in (cosines, sines)))


def rotate(x_BLC: Tensor, rotation: Rotation, heads: int) -> Tensor:
    """Rotate adjacent channel pairs of each head in float32; returns the layout and dtype of the input."""
    real, imaginary = x_BLC.float().unflatten(-1, (heads, -1, 2)).unbind(-1)
    cos, sin = rotation.cos_LP[:, None], rotation.sin_LP[:, None]
    turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    return turned.flatten(-3).to(x_BLC.dtype)
