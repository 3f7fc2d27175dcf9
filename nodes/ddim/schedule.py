"""Noise schedules and DDIM tables, always rebuilt in float64 from the betas.

Timesteps go from 0 (nearly clean) to 999 (noise), in ascending order as in the official code.
Papers: DDIM (arXiv 2010.02502), zero terminal SNR (Lin et al. 2023, arXiv 2305.08891), cosine schedule (arXiv
2102.09672).
"""
import math
from dataclasses import dataclass

import torch

NUM_TIMESTEPS = 1000
SPACINGS = ("uniform", "uniform_trailing")
SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class DiffusionParams:
    """What a checkpoint was trained with; spacing, guidance_rescale, steps and cfg are recommended for it."""
    parameterization: str       # "eps" or "v"
    linear_start: float         # first and last beta of the linear shape
    linear_end: float
    zero_snr: bool
    base_scale: float | None    # last value of the dynamic rescale, None: none
    spacing: str                # one of SPACINGS
    guidance_rescale: float
    shape: str = "linear"       # one of SHAPES
    steps: int = 50
    cfg: float = 7.5

    def __post_init__(self):
        if self.shape not in SHAPES:
            raise ValueError(f"The noise schedule '{self.shape}' is unknown. Choose one of {', '.join(SHAPES)}.")
        if self.parameterization not in ("eps", "v"):
            raise ValueError(f"The parameterization '{self.parameterization}' is unknown. Choose one of eps, v.")
        if self.spacing not in SPACINGS:
            raise ValueError(f"The timestep spacing '{self.spacing}' is unknown. Choose one of {', '.join(SPACINGS)}.")
        if self.zero_snr and self.parameterization == "eps":
            raise ValueError(
                "An eps-prediction model cannot use a zero-terminal-SNR schedule: at the last timestep alpha_bar is 0, "
                "so x0 = (x - eps) / 0 is undefined. Use parameterization 'v', or turn rescale_betas_zero_snr off.")


def make_betas(params: DiffusionParams) -> torch.Tensor:
    """Betas [1000] in float64: cosine, or linear in their square root; rescaled to zero terminal SNR if asked."""
    if params.shape == "cosine":
        betas = cosine_betas()
    else:
        start, end = params.linear_start ** 0.5, params.linear_end ** 0.5
        betas = torch.linspace(start, end, NUM_TIMESTEPS, dtype=torch.float64) ** 2
    return zero_terminal_snr(betas) if params.zero_snr else betas


def cosine_betas() -> torch.Tensor:
    """Betas [1000] in float64 for which alpha_bar falls as a squared cosine (arXiv 2102.09672, eq. 17). The cap keeps
    the last alpha_bar above 0: it is 2.4e-9."""
    offset, largest = 0.008, 0.999
    angles = (torch.arange(NUM_TIMESTEPS + 1, dtype=torch.float64) / NUM_TIMESTEPS + offset) / (1 + offset)
    alphas_bar = (angles * math.pi / 2).cos() ** 2
    return (1 - alphas_bar[1:] / alphas_bar[:-1]).clamp(max=largest)


def zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Shift and stretch sqrt(alpha_bar) so that it ends at exactly 0 and starts where it did (Lin et al., Alg. 1)."""
    root = torch.cumprod(1 - betas, 0).sqrt()
    alphas_bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return 1 - torch.cat([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])


def make_alphas_cumprod(params: DiffusionParams) -> torch.Tensor:
    """alpha_bar [1000] in float64; its last value is exactly 0 with zero terminal SNR."""
    return torch.cumprod(1 - make_betas(params), 0)


def make_scale_arr(base_scale: float | None) -> torch.Tensor | None:
    """Scale of x0 over time that DynamiCrafter trains with: [1400] float64, 1 to base_scale over 400, then constant."""
    if base_scale is None:
        return None
    return torch.cat([torch.linspace(1, base_scale, 400, dtype=torch.float64),
                      torch.full((NUM_TIMESTEPS,), base_scale, dtype=torch.float64)])


def make_timesteps(steps: int, spacing: str, original: bool = False) -> list[int]:
    """Timesteps in ascending order: exactly `steps` of them, all inside 0..999.

    original: the official tables instead, which have another length for some step counts, or reach -1 or 1000.
    """
    if not 1 <= steps <= NUM_TIMESTEPS:
        raise ValueError(f"steps is {steps}. The schedule has {NUM_TIMESTEPS} timesteps: choose 1 to {NUM_TIMESTEPS}.")
    if spacing == "uniform":
        if original:
            return [t + 1 for t in range(0, NUM_TIMESTEPS, NUM_TIMESTEPS // steps)]
        return [min(i * NUM_TIMESTEPS // steps + 1, NUM_TIMESTEPS - 1) for i in range(steps)]
    if spacing != "uniform_trailing":
        raise ValueError(f"The timestep spacing '{spacing}' is unknown. Choose one of {', '.join(SPACINGS)}.")
    # The official code has flip(round(arange(1000, 0, -1000 / steps))) - 1. arange adds `delta` in floating point, and
    # its rounding error decides ties at one half, so the same sums are needed for equal results. The fixed length
    # drops the extra element near 0 that arange returns at 61, 103, 121, ... steps.
    end = float(NUM_TIMESTEPS)
    delta = (end - end / steps) - end
    count = math.ceil(end / (end / steps)) if original else steps
    return [round(end + i * delta) - 1 for i in range(count)][::-1]


@dataclass(frozen=True)
class StepCoefficients:
    """The numbers of one DDIM step."""
    timestep: int
    alpha: float        # alpha_bar at this timestep
    alpha_prev: float   # alpha_bar at the next one to be sampled
    sigma: float        # standard deviation of the noise added
    direction: float    # factor of eps: sqrt(1 - alpha_prev - sigma^2)
    rescale: float      # factor of x0 (dynamic rescale)


@dataclass(frozen=True)
class DDIMTables:
    """The numbers of a whole DDIM run in float64, [steps], ascending in time: sampling starts at the end."""
    timesteps: list[int]
    alphas: torch.Tensor
    alphas_prev: torch.Tensor
    sigmas: torch.Tensor
    directions: torch.Tensor
    scale: torch.Tensor
    scale_prev: torch.Tensor

    def __len__(self):
        return len(self.timesteps)

    def step(self, index: int) -> StepCoefficients:
        """Coefficients at table position `index` (len - 1 is the first step taken)."""
        return StepCoefficients(
            self.timesteps[index], self.alphas[index].item(), self.alphas_prev[index].item(), self.sigmas[index].item(),
            self.directions[index].item(), (self.scale_prev[index] / self.scale[index]).item())


def make_tables(alphas_cumprod: torch.Tensor, steps: int, spacing: str, eta: float,
                scale_arr: torch.Tensor | None = None, original: bool = False) -> DDIMTables:
    """DDIM tables for `steps` steps of stochasticity `eta`; finite everywhere unless `original`.

    original: lengths, float32 rounding and missing clamps of the official code, for comparison. They give NaN at
    7, 11, 14, 15, 20, 25, ... steps with eta 1 and zero terminal SNR.
    """
    if not eta >= 0 or eta == float("inf"):
        raise ValueError(f"eta is {eta}. It must be a number from 0 (deterministic) to 1 (full DDPM noise).")
    timesteps = make_timesteps(steps, spacing, original)
    if timesteps[-1] >= NUM_TIMESTEPS:
        raise ValueError(
            f"The original '{spacing}' table for {steps} steps has timestep {timesteps[-1]}, but the last one is "
            f"{NUM_TIMESTEPS - 1}. Choose the fixed tables, or a number of steps that divides {NUM_TIMESTEPS}.")
    indices = torch.tensor(timesteps)
    variances = _official_variances if original else _variances
    alphas, alphas_prev, sigmas, directions = variances(alphas_cumprod.to("cpu", torch.float64), indices, eta)
    scale = torch.ones_like(alphas) if scale_arr is None else scale_arr.to("cpu", torch.float64)[indices]
    return DDIMTables(timesteps, alphas, alphas_prev, sigmas, directions, scale, torch.cat([scale[:1], scale[:-1]]))


def _variances(alphas_cumprod, indices, eta):
    alphas = alphas_cumprod[indices]
    alphas_prev = torch.cat([alphas_cumprod[:1], alphas[:-1]])
    # Neighbours are equal if two timesteps are (1000 uniform steps) or if a schedule was stored with low precision.
    # The quotients are then 0 / 0; they get the value of a step that changes nothing.
    kept = torch.where(alphas < alphas_prev, alphas / alphas_prev, 1.0)
    noised = torch.where(alphas < 1, (1 - alphas_prev) / (1 - alphas), 0.0)
    sigmas = eta * (noised * (1 - kept)).clamp(min=0).sqrt()
    # eta above 1 must not add more noise than the next timestep has.
    sigmas = torch.minimum(sigmas, (1 - alphas_prev).clamp(min=0).sqrt())
    directions = (1 - alphas_prev - sigmas ** 2).clamp(min=0).sqrt()
    return alphas, alphas_prev, sigmas, directions


def _official_variances(alphas_cumprod, indices, eta):
    """The same without clamps and in the official precision: buffers float32, sigma float64, direction float32."""
    alphas_cumprod = alphas_cumprod.float()
    alphas = alphas_cumprod[indices]
    alphas_prev = torch.cat([alphas_cumprod[:1], alphas[:-1]]).double()
    sigmas = eta * ((1 - alphas_prev) * (1 - alphas).reciprocal() * (1 - alphas / alphas_prev)).sqrt()
    directions = (1 - alphas_prev.float() - sigmas.float() ** 2).sqrt()
    return alphas.double(), alphas_prev, sigmas, directions.double()
