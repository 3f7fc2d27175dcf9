"""What a DynamiCrafter checkpoint is made of, read from a configuration in the official YAML format.

The published variants (arXiv 2310.12190) are written here as the same kind of dict, so there is one way in.
"""
from __future__ import annotations

from dataclasses import dataclass

from ..diffusion.schedule import DiffusionParams
from .resampler import ResamplerParams
from .unet import UNetParams

VARIANTS = ("256", "512", "512_interp", "1024")
# fs is the frame stride for 256 (more is faster) and frames a second for the others (more is slower).
DEFAULT_FS = {"256": 3, "512": 24, "512_interp": 5, "1024": 10}
DEFAULT_ARCH = "ViT-H-14"

# The only values of these settings that the published models use and this network has. A setting that is absent
# and matters changes the keys, which are checked one by one.
FIXED_UNET = {
    "use_linear": True, "temporal_conv": True, "temporal_attention": True, "temporal_selfatt_only": True,
    "use_relative_position": False, "use_causal_attention": False, "addition_attention": True,
    "image_cross_attention": True, "fs_condition": True, "dims": 2, "conv_resample": True, "resblock_updown": False,
    "use_scale_shift_norm": False, "tempspatial_aware": False, "num_heads": -1,
}
UNUSED_UNET = {"dropout", "use_checkpoint", "use_fp16", "temporal_length"}  # training and length: no change here
UNET_DEFAULTS = {"transformer_depth": 1, "image_cross_attention_scale_learnable": False, "default_fs": 4}
RESAMPLER_DEFAULTS = {"ff_mult": 4}


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Everything that the weights themselves do not say."""

    unet: UNetParams
    diffusion: DiffusionParams
    scale_factor: float     # latent = scale_factor * posterior mean
    ddconfig: dict          # of the autoencoder
    embed_dim: int
    text_arch: str          # names of open_clip model configurations
    text_layer: str         # "penultimate" or "last"
    vision_arch: str


def published(variant):
    """The official configuration of "256", "512", "512_interp" or "1024", as a dict."""
    if variant not in VARIANTS:
        raise ValueError(f"Variant {variant!r} is unknown: choose one of {', '.join(VARIANTS)}.")
    unet = {
        "in_channels": 8, "out_channels": 4, "model_channels": 320, "attention_resolutions": [4, 2, 1],
        "num_res_blocks": 2, "channel_mult": [1, 2, 4, 4], "num_head_channels": 64, "transformer_depth": 1,
        "context_dim": 1024, "default_fs": DEFAULT_FS[variant],
        "image_cross_attention_scale_learnable": variant == "256",
    }
    resampler = {
        "dim": 1024, "depth": 4, "dim_head": 64, "heads": 12, "num_queries": 16, "embedding_dim": 1280,
        "output_dim": 1024, "ff_mult": 4, "video_length": 16,
    }
    vae = {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }
    params = {
        "linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000, "scale_factor": 0.18215,
        "unet_config": {"params": unet},
        "first_stage_config": {"params": {"embed_dim": 4, "ddconfig": vae}},
        "cond_stage_config": {"params": {"layer": "penultimate"}},
        "image_proj_stage_config": {"params": resampler},
    }
    if variant != "256":
        params |= {"parameterization": "v", "rescale_betas_zero_snr": True, "use_dynamic_rescale": True,
                   "base_scale": 0.3 if variant == "1024" else 0.7}
    return {"model": {"params": params}}


def read_yaml(path):
    """An official-format YAML file as a plain dict, references resolved."""
    import omegaconf
    import yaml

    try:
        config = omegaconf.OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    return omegaconf.OmegaConf.to_container(config, resolve=True)


def parse(config, source):
    """`CheckpointConfig` from an official-format dict; `source` names it in errors.

    Raises ValueError for a missing entry and for a setting that this network does not have.
    """
    params = _entry(config, "model.params", source)
    if params.get("timesteps", 1000) != 1000 or params.get("beta_schedule", "linear") != "linear":
        raise ValueError(f"{source}: only 1000 timesteps of the linear schedule are supported; it asks for "
                         f"{params.get('timesteps', 1000)}, {params.get('beta_schedule', 'linear')}.")
    vae = _entry(params, "first_stage_config.params", source)
    text, vision = (((params.get(name) or {}).get("params") or {}) for name in ("cond_stage_config",
                                                                                "img_cond_stage_config"))
    return CheckpointConfig(
        unet=_unet(params, source), diffusion=_diffusion(params),
        scale_factor=params.get("scale_factor", 0.18215), ddconfig=_entry(vae, "ddconfig", source),
        embed_dim=_entry(vae, "embed_dim", source), text_arch=text.get("arch", DEFAULT_ARCH),
        text_layer=text.get("layer", "last"), vision_arch=vision.get("arch", DEFAULT_ARCH))


def _entry(config, path, source):
    for name in path.split("."):
        if not isinstance(config, dict) or name not in config:
            raise ValueError(f"{source} is not a DynamiCrafter configuration: it has no {path}. Give a YAML in the "
                             "format of the official configs/inference_*.yaml.")
        config = config[name]
    return config


def _unet(params, source):
    given = {**UNET_DEFAULTS, **_entry(params, "unet_config.params", source)}
    for name, value in given.items():
        if name in FIXED_UNET and value != FIXED_UNET[name]:
            raise ValueError(f"{source}: unet_config sets {name} to {value}; this network has {FIXED_UNET[name]} only, "
                             "as all published DynamiCrafter models.")
    resampler = {**RESAMPLER_DEFAULTS, **_entry(params, "image_proj_stage_config.params", source)}
    given = {name: value for name, value in given.items() if name not in FIXED_UNET.keys() | UNUSED_UNET}
    return _build(UNetParams, given | {"resampler": _build(ResamplerParams, resampler, source)}, source)


def _build(kind, given, source):
    names = kind.__dataclass_fields__.keys()
    missing, unknown = [name for name in names if name not in given], [name for name in given if name not in names]
    if missing or unknown:
        raise ValueError(f"{source}: {kind.__name__} lacks {missing or 'nothing'} and does not know "
                         f"{unknown or 'nothing'} of what is given. Give a YAML in the official format.")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def _diffusion(params):
    zero_snr = bool(params.get("rescale_betas_zero_snr", False))
    return DiffusionParams(
        parameterization=params.get("parameterization", "eps"),
        linear_start=params.get("linear_start", 1e-4), linear_end=params.get("linear_end", 2e-2),
        zero_snr=zero_snr, base_scale=params.get("base_scale", 0.7) if params.get("use_dynamic_rescale") else None,
        spacing="uniform_trailing" if zero_snr else "uniform", guidance_rescale=0.7 if zero_snr else 0.0)
