"""The losses of distribution matching (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867), as in Self-Forcing.

Pure functions. Layouts: B videos, C channels, F latent frames, H, W latent height and width. `lead` is the number of
frames at the start that are given (clean, at timestep 0, or finished before): no loss looks at them.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...causal_wan.schedule import NUM_TIMESTEPS, precise_dtype


def draw_timesteps(batch: int, blocks: Sequence[int], *, shift: float, low: float, high: float, per_block: bool,
                   generator: torch.Generator) -> Tensor:
    """Timesteps [B, F] at which the scores are compared: uniform over the 1000 levels, shifted towards noise, clamped
    to low .. high. One for the whole video or, with `per_block`, one a block."""
    level = torch.randint(0, NUM_TIMESTEPS, (batch, len(blocks) if per_block else 1), generator=generator)
    even = level.double() / NUM_TIMESTEPS
    t = (NUM_TIMESTEPS * shift * even / (1 + (shift - 1) * even)).clamp(low, high).float()
    return t.repeat_interleave(torch.tensor(blocks), dim=1) if per_block else t.expand(batch, sum(blocks)).clone()


def sigmas(t_BF: Tensor) -> Tensor:
    """Fraction of noise [B, 1, F, 1, 1] of each frame, in float64."""
    return (t_BF.to(precise_dtype(t_BF.device)) / NUM_TIMESTEPS)[:, None, :, None, None]


def guided(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598); 1 is no guidance. Self-Forcing writes scale 4 as
    `cond + 3 (cond - uncond)`."""
    return negative + scale * (positive - negative)


def matching_gradient(x0: Tensor, real_x0: Tensor, fake_x0: Tensor, lead: int = 0) -> Tensor:
    """Direction [B, C, F - lead, H, W] in which the student's x0 leaves the teacher's distribution, in float64:
    (fake - real) / mean |x0 - real| of each video; 0 where this is NaN or infinite."""
    x0, real, fake = (each[:, :, lead:].to(precise_dtype(each.device)) for each in (x0, real_x0, fake_x0))
    scale = (x0 - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return torch.nan_to_num((fake - real) / scale, nan=0.0, posinf=0.0, neginf=0.0)


def student_loss(x0: Tensor, real_x0: Tensor, fake_x0: Tensor, lead: int = 0) -> Tensor:
    """0.5 * MSE(x0, stopgrad(x0 - g)) in float64: its gradient by x0 is g / (number of values)."""
    with torch.no_grad():
        target = x0[:, :, lead:].to(precise_dtype(x0.device)) - matching_gradient(x0, real_x0, fake_x0, lead)
    return 0.5 * (x0[:, :, lead:].to(target) - target).square().mean()


def flow_loss(flow: Tensor, x0: Tensor, noise: Tensor, lead: int = 0) -> Tensor:
    """The fake score's own denoising loss: mean squared error of its flow (noise - x0)."""
    return (flow - (noise - x0))[:, :, lead:].square().mean()
