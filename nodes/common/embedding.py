"""Sinusoidal embedding of numbers."""
from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoids(values_B: Tensor, width: int) -> Tensor:
    """Sinusoidal features [B, width]: cosines, then sines, with periods from 2 pi to 20000 pi."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, device=values_B.device) / (width // 2))
    angles = values_B[:, None].float() * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
