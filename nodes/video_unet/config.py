"""Settings that a video U-Net was trained with and that its weights do not show, as JSON in the file's header."""
from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import partial

from ..common.values import number, parse_json, shown, whole, wholes
from ..ddim.schedule import DiffusionParams
from .unet import VideoUNetParams

HEADER = "stillmotion.video_unet"                # entry of the .safetensors header
TEXT_ENCODERS = {"demo": 32, "demo, 96x96": 32, "clip_l": 768}  # by the width of their tokens
SPACES = {"pixels": 3, "latent": None}           # by the number of channels, None: any
CHOICES = {"schedule": ("cosine", "linear"), "prediction": ("eps", "v"), "space": tuple(SPACES),
           "text_encoder": tuple(TEXT_ENCODERS)}
# How the sizes are checked. The other entries are in CHOICES, or checked by the configuration itself.
FACTOR = partial(whole, high=64)
SIZES = {"frames": whole, "height": whole, "width": whole, "spatial_factor": FACTOR, "temporal_factor": FACTOR,
         "scale_factor": partial(number, low=0, high=1e6)}
PARAMS = {"channels": partial(whole, high=1024), "model_channels": whole, "channel_mult": partial(wholes, high=64),
          "num_res_blocks": partial(whole, high=16), "spatial_attention": partial(wholes, low=0, high=7, least=0),
          "head_channels": whole, "context_dim": whole, "additional_condition_dim": partial(whole, low=0)}
LINEAR_BETAS = (0.00085, 0.012)                  # linear in their square root, as in Stable Diffusion


@dataclass(frozen=True, kw_only=True)
class VideoUNetConfig:
    """Sizes, noise, clips and text of a trained network. Frames, height and width (in pixels) are what it was trained
    with; it takes others too."""

    params: VideoUNetParams
    schedule: str           # "cosine" (arXiv 2102.09672) or "linear"
    prediction: str         # "eps" or "v"
    frames: int
    height: int
    width: int
    space: str              # "pixels" or "latent"
    scale_factor: float     # the network sees clips (pixels in -1..1, or latents) multiplied by this
    spatial_factor: int     # pixels per latent position; 1 for pixels
    temporal_factor: int    # frames per latent frame after the first; 1 for pixels and for image VAEs
    text_encoder: str       # one of TEXT_ENCODERS

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}. Choose one of {', '.join(allowed)}.")
        width = TEXT_ENCODERS[self.text_encoder]
        if self.params.context_dim != width:
            raise ValueError(f"context_dim is {self.params.context_dim}, but the text encoder {self.text_encoder} "
                             f"gives tokens {width} wide. Set context_dim to {width}, or use another text encoder.")
        if SPACES[self.space] not in (None, self.params.channels):
            raise ValueError(f"channels is {self.params.channels}, but a network in {self.space} has "
                             f"{SPACES[self.space]}. Set channels to {SPACES[self.space]}, or space to latent.")
        if self.space == "pixels" and (self.spatial_factor, self.temporal_factor) != (1, 1):
            raise ValueError(f"spatial_factor is {self.spatial_factor} and temporal_factor is {self.temporal_factor}, "
                             "but for a network in pixels both must be 1.")
        if not 0 < self.scale_factor < float("inf"):
            raise ValueError(f"scale_factor is {self.scale_factor}. It must be above 0 (0.18215 for latents of Stable "
                             "Diffusion's VAE, 1 for pixels).")

    @property
    def diffusion(self) -> DiffusionParams:
        start, end = LINEAR_BETAS
        return DiffusionParams(parameterization=self.prediction, linear_start=start, linear_end=end, zero_snr=False,
                               base_scale=None, spacing="uniform_trailing", guidance_rescale=0.0, shape=self.schedule,
                               steps=20, cfg=2.0)


def to_json(config: VideoUNetConfig) -> str:
    return json.dumps(asdict(config))


def from_json(text: str, source: str) -> VideoUNetConfig:
    """The configuration in `text`; `source` says in messages where it comes from. Raises ValueError for anything else,
    for unknown or missing entries and for bad values."""
    values = _checked(parse_json(text, f"{source}: the entry {HEADER}"), VideoUNetConfig, SIZES, source)
    params = _checked(values["params"], VideoUNetParams, PARAMS, f"{source}, params")
    return VideoUNetConfig(**{**values, "params": VideoUNetParams(**params)})


def _checked(values, kind, checks, source):
    """`values`, if they are exactly the fields of the dataclass `kind`, each accepted by its function in `checks`."""
    names = {field.name for field in fields(kind)}
    if not isinstance(values, dict) or set(values) != names:
        found = ", ".join(sorted(values)) if isinstance(values, dict) else repr(values)
        raise ValueError(f"{source}: the configuration of a video U-Net has the entries {', '.join(sorted(names))}; "
                         f"found: {shown(found)}. The file was written by another version, or is of another kind. "
                         "Use a file of this version.")
    return {name: checks[name](value, f"{source}: {name}") if name in checks else value
            for name, value in values.items()}
