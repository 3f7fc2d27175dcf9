"""Factors of Wan's rotary position embedding over frame, row and column (RoFormer, arXiv 2104.09864).

`common/fused.py` applies them. Angles are computed in float64 from absolute indices, so there is no table that a long
video could outgrow. Layouts: L tokens (frame, row, column, in this order), P pairs of channels of one head.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

THETA = 10000.0


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Channel pairs of a head rotated by frame, row and column: 22, 21, 21 of 64."""
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


def make_rotation(frames: Sequence[int], height: int, width: int, head_dim: int, device=None) -> Tensor:
    """Cosine and sine [L, P, 2], float32, of the angle by which each pair of channels is turned, for the tokens of the
    latent frames with the given absolute indices, height x width tokens each."""
    sizes = (len(frames), height, width)
    positions = (torch.tensor(list(frames), dtype=torch.float64), torch.arange(height), torch.arange(width))
    parts = []
    for axis, (pairs, position) in enumerate(zip(axis_pairs(head_dim), positions)):
        frequency = THETA ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        angle = position.double()[:, None] * frequency
        shape = [1, 1, 1, pairs, 2]
        shape[axis] = sizes[axis]
        table = torch.stack((angle.cos(), angle.sin()), dim=-1).to(device, torch.float32)
        parts.append(table.view(shape).expand(*sizes, pairs, 2))
    return torch.cat(parts, dim=3).flatten(0, 2)
