"""The few-step flow schedule of Self-Forcing (arXiv 2506.08009) and LongLive (arXiv 2509.22622).

Flow matching: x_sigma = (1 - sigma) * x0 + sigma * noise, the network predicts noise - x0, and timesteps are
1000 * sigma. Few-step models jump to x0 and add fresh noise for the next step.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000


class FlowStep(NamedTuple):
    timestep: float  # input of the network, 0 (clean) to 1000 (noise)
    sigma: float     # fraction of noise


def make_sigmas(shift: float) -> Tensor:
    """Sigmas [1000] in float64, descending from 1: evenly spaced, then shifted towards noise."""
    if not 0 < shift < float("inf"):
        raise ValueError(f"shift is {shift}. It must be a positive number; causal Wan models were trained with 5.")
    even = 1 - torch.arange(NUM_TIMESTEPS, dtype=torch.float64) / NUM_TIMESTEPS
    return shift * even / (1 + (shift - 1) * even)


def make_steps(step_list: Sequence[int], shift: float, warp: bool) -> tuple[FlowStep, ...]:
    """Denoising steps from a `denoising_step_list`, for example [1000, 750, 500, 250].

    warp: the numbers are positions from the end of the shifted table (Self-Forcing, LongLive: 1000, 937.5, 833.3, 625
    with shift 5); otherwise they are timesteps, and the nearest sigma in the table is used (CausVid).
    """
    falling = all(a > b for a, b in zip(step_list, step_list[1:]))
    if not step_list or not falling or not 0 < step_list[-1] <= step_list[0] <= NUM_TIMESTEPS:
        raise ValueError(f"The denoising steps are {list(step_list)}. They must be falling numbers from "
                         f"{NUM_TIMESTEPS} to 1. Use those that the model was trained with, for example 1000, 750, "
                         "500, 250.")
    sigmas = make_sigmas(shift)
    if warp:
        chosen = [sigmas[NUM_TIMESTEPS - step].item() for step in step_list]
        return tuple(FlowStep(NUM_TIMESTEPS * sigma, sigma) for sigma in chosen)
    nearest = [(sigmas * NUM_TIMESTEPS - step).abs().argmin() for step in step_list]
    return tuple(FlowStep(float(step), sigmas[index].item()) for step, index in zip(step_list, nearest))


def precise_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple devices, which do not support float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def predict_x0(x: Tensor, flow: Tensor, sigma: float) -> Tensor:
    """Clean latent from a noisy one and its flow, computed in float64."""
    precise = precise_dtype(x.device)
    return (x.to(precise) - sigma * flow.to(precise)).to(x.dtype)


def renoise(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """The clean latent with noise added at level sigma."""
    return (1 - sigma) * x0 + sigma * noise
