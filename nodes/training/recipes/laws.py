"""How noisy the demo models' training clips are: laws for small networks on small shapes before a plain ground.

They are no defaults of the trainer: on real clips the laws of `objectives` are right.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..objectives import shift_sigmas


def noisy_timesteps(batch: int, generator: torch.Generator) -> Tensor:
    """Timesteps 0..999 [B], three in five from the noisy end. There the network must generate the motion from image and
    text alone; with uniform timesteps a small model produces still images. The rest keep colours accurate."""
    uniform = torch.randint(0, 1000, (batch,), generator=generator)
    noisy = torch.randint(800, 1000, (batch,), generator=generator)
    kind = torch.rand(batch, generator=generator)
    return torch.where(kind < 0.15, 999, torch.where(kind < 0.5, noisy, uniform))


def block_sigmas(shape: Sequence[int], shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels of `shape`, with the sampler's shift: most are near 1, and one in five is exactly 1, where a block's
    motion must come from image, text and context alone."""
    shifted = shift_sigmas(torch.rand(tuple(shape), generator=generator), shift)
    return torch.where(torch.rand(tuple(shape), generator=generator) < 0.2, 1.0, shifted)
