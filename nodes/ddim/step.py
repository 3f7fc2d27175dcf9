"""One DDIM step (arXiv 2010.02502) as a pure function, in the scale x = sqrt(a) x0 + sqrt(1 - a) eps.

Order as in DynamiCrafter: model output -> x0 and eps -> clip x0 -> dynamic rescale of x0 -> next x.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .schedule import StepCoefficients

CLIP_MODES = ("off", "static", "dynamic")
DYNAMIC_PERCENTILE = 0.995  # Imagen (arXiv 2205.11487), section 2.3


@dataclass(frozen=True)
class Clip:
    """How predicted x0 is kept in range.

    static clamps to +-limit; dynamic first scales down a sample whose 99.5th percentile of |x0| is beyond the limit.
    recompute_eps: compute eps from the clipped x0, so that both again add up to x.
    """
    mode: str
    limit: float
    recompute_eps: bool

    def __post_init__(self):
        if self.mode not in CLIP_MODES:
            raise ValueError(f"The x0 clip mode '{self.mode}' is unknown. Choose one of {', '.join(CLIP_MODES)}.")
        if not 0 < self.limit < float("inf"):
            raise ValueError(f"The x0 clip value is {self.limit}. It must be above 0 (3 suits image latents).")


class DDIMStep(NamedTuple):
    """x: the next latent; x0: the prediction used for it; x0_raw: the prediction before clip and rescale."""
    x: torch.Tensor
    x0: torch.Tensor
    x0_raw: torch.Tensor


def predict(x: torch.Tensor, model_output: torch.Tensor, parameterization: str, alpha: float):
    """(x0, eps) from an eps or v prediction at signal level alpha (alpha_bar, 0 allowed for v)."""
    signal, noise = alpha ** 0.5, (1 - alpha) ** 0.5
    if parameterization == "v":
        return signal * x - noise * model_output, signal * model_output + noise * x
    return (x - noise * model_output) / signal, model_output


def clip_x0(x0: torch.Tensor, clip: Clip) -> torch.Tensor:
    """x0 with every value inside +-clip.limit (mode off: unchanged)."""
    if clip.mode == "off":
        return x0
    if clip.mode == "static":
        return x0.clamp(-clip.limit, clip.limit)
    reach = torch.quantile(x0.abs().flatten(1).float(), DYNAMIC_PERCENTILE, dim=1).clamp(min=clip.limit)
    reach = reach.to(x0.dtype).view(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-reach, reach) * (clip.limit / reach)


def ddim_step(x: torch.Tensor, model_output: torch.Tensor, parameterization: str, c: StepCoefficients, clip: Clip,
              noise: torch.Tensor | None) -> DDIMStep:
    """The latent at the next timestep.

    x, model_output: [B, C, ...]; model_output is the guided prediction. noise: same shape, standard normal; it may be
    None where c.sigma is 0.
    """
    x0_raw, eps = predict(x, model_output, parameterization, c.alpha)
    x0 = clip_x0(x0_raw, clip)
    if clip.recompute_eps and clip.mode != "off":
        eps = (x - c.alpha ** 0.5 * x0) / (1 - c.alpha) ** 0.5
    x0 = x0 * c.rescale
    x_prev = c.alpha_prev ** 0.5 * x0 + c.direction * eps
    if c.sigma:
        x_prev = x_prev + c.sigma * noise
    return DDIMStep(x_prev, x0, x0_raw)
