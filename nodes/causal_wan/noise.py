"""Noise seeded per latent frame, not per run, so that a longer video begins with the frames of a shorter one."""
from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor


def seeded_noise(seed: int, batch: int, channels: int, height: int, width: int) -> Callable[[int, int, int], Tensor]:
    """`noise(start, count, step)` [batch, channels, count, height, width] in float32 on the CPU.

    Each frame of each video in the batch has its own generator for the initial noise (step 0) and for each re-noising,
    so its values depend only on seed, batch index, frame and step.
    """
    def frame(row: int, index: int, step: int) -> Tensor:
        # Hashed, because generators with consecutive seeds are not guaranteed to be independent.
        name = hashlib.blake2b(f"{seed} {row} {index} {step}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(name, "little", signed=True))
        return torch.randn(channels, height, width, generator=generator)

    def noise(start: int, count: int, step: int) -> Tensor:
        rows = [torch.stack([frame(row, start + i, step) for i in range(count)], dim=1) for row in range(batch)]
        return torch.stack(rows)

    return noise
