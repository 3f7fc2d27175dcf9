"""Sizes and settings of a DynamiCrafter checkpoint, read from a configuration in the official YAML format.

The published variants (arXiv 2310.12190) are defined here as dicts of the same format.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..common.images import SMALL
from ..common.values import flag, number, shown, whole, wholes, word
from ..ddim.schedule import DiffusionParams
from .resampler import ResamplerParams
from .unet import UNetParams

VARIANTS = ("256", "512", "512_interp", "1024")
# fs is the frame stride for 256 (larger is faster) and frames per second for the others (larger is slower).
DEFAULT_FS = {"256": 3, "512": 24, "512_interp": 5, "1024": 10}
DEFAULT_ARCH = "ViT-H-14"
LATENT_SIZE = {"256": [32, 32], "512": [40, 64], "512_interp": [40, 64], "1024": [72, 128]}  # height, width
SMALL_STEPS, SMALL_CFG = 20, 1.5  # of models of SMALL pictures
STEPS, CFG = 50, 7.5              # of the others, the published ones

# The only values of these settings that the published models use and this network supports. Other settings that
# matter change the keys, which are all checked.
FIXED_UNET = {
    "use_linear": True, "temporal_conv": True, "temporal_attention": True, "temporal_selfatt_only": True,
    "use_relative_position": False, "use_causal_attention": False, "addition_attention": True,
    "image_cross_attention": True, "fs_condition": True, "dims": 2, "conv_resample": True, "resblock_updown": False,
    "use_scale_shift_norm": False, "tempspatial_aware": False, "num_heads": -1,
}
UNUSED_UNET = {"dropout", "use_checkpoint", "use_fp16", "temporal_length"}  # training, clip length: no effect here
UNET_DEFAULTS = {"transformer_depth": 1, "image_cross_attention_scale_learnable": False, "default_fs": 4}
RESAMPLER_DEFAULTS = {"ff_mult": 4}

GROUPS = 32  # of every group norm, in the U-Net and in the autoencoder
CHANNELS, LEVELS, REPEATS = partial(whole, high=1024), partial(wholes, high=1024), partial(whole, low=0, high=16)
# How the entries of each part are checked. All of them are required.
UNET = {"in_channels": CHANNELS, "out_channels": CHANNELS, "model_channels": whole, "attention_resolutions": LEVELS,
        "num_res_blocks": REPEATS, "channel_mult": partial(wholes, high=64), "num_head_channels": whole,
        "transformer_depth": partial(whole, high=16), "context_dim": whole,
        "image_cross_attention_scale_learnable": flag, "default_fs": partial(whole, low=0, high=1000)}
RESAMPLER = {"dim": whole, "depth": partial(whole, high=64), "dim_head": whole, "heads": CHANNELS,
             "num_queries": CHANNELS, "embedding_dim": whole, "output_dim": whole, "ff_mult": partial(whole, high=64),
             "video_length": CHANNELS}
AUTOENCODER = {"double_z": flag, "z_channels": CHANNELS, "resolution": whole, "in_channels": CHANNELS,
               "out_ch": CHANNELS, "ch": whole, "ch_mult": partial(wholes, high=64), "num_res_blocks": REPEATS,
               "attn_resolutions": partial(wholes, least=0), "dropout": partial(number, low=-1, high=1)}


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Everything that the weights do not show."""

    unet: UNetParams
    diffusion: DiffusionParams
    scale_factor: float     # latent = scale_factor * posterior mean
    ddconfig: dict          # of the autoencoder
    embed_dim: int
    text_arch: str          # names of open_clip model configurations
    text_layer: str         # "penultimate" or "last"
    vision_arch: str
    size: tuple[int, int] | None  # width and height in pixels of the training pictures, None: not in the configuration


def published(variant):
    """The official configuration of "256", "512", "512_interp" or "1024", as a dict."""
    if variant not in VARIANTS:
        raise ValueError(f"The variant {variant!r} is unknown. Choose one of {', '.join(VARIANTS)}.")
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
        "image_size": LATENT_SIZE[variant],
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
    """An official-format YAML file as a plain dict. Only references of the form `${entry.of.the.file}` are
    resolved, and only to a word or a number; nothing that OmegaConf would look up elsewhere or compute."""
    import omegaconf
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError(f"{path} repeats parts of itself with aliases (*name). Write them out.")
        config = omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.create(text))
    except (yaml.YAMLError, UnicodeDecodeError, omegaconf.errors.OmegaConfBaseException, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} is not a YAML file: {why}. Correct it, or copy the official one.") from error
    return _resolved(config, config, path)


def _resolved(part, config, path):
    """`part` of `config` with its references replaced."""
    if isinstance(part, dict):
        return {key: _resolved(value, config, path) for key, value in part.items()}
    if isinstance(part, list):
        return [_resolved(value, config, path) for value in part]
    if not isinstance(part, str) or "${" not in part:
        return part
    found = re.fullmatch(r"\$\{([\w.]+)\}", part)
    target = config
    for name in found[1].split(".") if found else [""]:
        target = target.get(name) if isinstance(target, dict) else None
    if target is None or isinstance(target, (dict, list)) or isinstance(target, str) and "${" in target:
        raise ValueError(f"{path} has the entry {shown(part)}, which is not resolved: only ${{entry.of.the.file}} is, "
                         "if that entry is a word or a number. Write the value instead.")
    return target


def parse(config, source):
    """`CheckpointConfig` from an official-format dict; `source` names it in errors.

    Raises ValueError for a missing entry and for a setting that this network does not have.
    """
    params = _section(config, "model.params", source)
    if params.get("timesteps", 1000) != 1000 or params.get("beta_schedule", "linear") != "linear":
        raise ValueError(f"{source}: only 1000 timesteps with the linear schedule are supported, but it has "
                         f"{shown(params.get('timesteps', 1000))}, {shown(params.get('beta_schedule', 'linear'))}.")
    vae = _section(params, "first_stage_config.params", source)
    text, vision = (_section(params, f"{name}.params", source) if params.get(name) else {}
                    for name in ("cond_stage_config", "img_cond_stage_config"))
    layer = text.get("layer", "last")
    if layer not in ("penultimate", "last"):
        raise ValueError(f"{source}: the layer of the text tower is {shown(layer)}. Allowed: penultimate, last.")
    ddconfig = _autoencoder(vae, source)
    size = _size(params, 2 ** (len(ddconfig["ch_mult"]) - 1), source)
    return CheckpointConfig(
        unet=_unet(params, source), diffusion=_diffusion(params, size, source), size=size,
        scale_factor=number(params.get("scale_factor", 0.18215), f"{source}: scale_factor", 0, 1000),
        ddconfig=ddconfig,
        embed_dim=whole(vae.get("embed_dim"), f"{source}: embed_dim of the VAE", high=1024),
        text_arch=text.get("arch", DEFAULT_ARCH), text_layer=layer, vision_arch=vision.get("arch", DEFAULT_ARCH))


def _section(config, path, source):
    for name in path.split("."):
        if not isinstance(config, dict) or not isinstance(config.get(name), dict):
            raise ValueError(f"{source} is not a DynamiCrafter configuration: it has no section {path}. Use a YAML in "
                             "the format of the official configs/inference_*.yaml.")
        config = config[name]
    return config


def _unet(params, source):
    given = {**UNET_DEFAULTS, **_section(params, "unet_config.params", source)}
    for name, value in given.items():
        if name in FIXED_UNET and value != FIXED_UNET[name]:
            raise ValueError(f"{source}: unet_config sets {name} to {shown(value)}. This network supports only "
                             f"{FIXED_UNET[name]}, as in all published DynamiCrafter models.")
    resampler = {**RESAMPLER_DEFAULTS, **_section(params, "image_proj_stage_config.params", source)}
    given = {name: value for name, value in given.items() if name not in FIXED_UNET.keys() | UNUSED_UNET}
    unet = UNetParams(**_checked(UNET, given, "unet_config", source),
                      resampler=ResamplerParams(**_checked(RESAMPLER, resampler, "image_proj_stage_config", source)))
    if unet.model_channels % GROUPS or unet.model_channels < unet.num_head_channels:
        raise ValueError(f"{source}: model_channels is {unet.model_channels}. It must be a multiple of {GROUPS} and at "
                         f"least num_head_channels ({unet.num_head_channels}).")
    return unet


def _size(params, factor, source):
    """`image_size` (height and width of the latent, or one number for both) in pixels: width, height."""
    given = params.get("image_size")
    if given is None:
        return None
    sides = wholes(given if isinstance(given, list) else [given] * 2, f"{source}: image_size", high=1024)
    if len(sides) != 2:
        raise ValueError(f"{source}: image_size is {shown(given)}. It must be height and width of the latent.")
    return sides[1] * factor, sides[0] * factor


def _autoencoder(vae, source):
    found = _checked(AUTOENCODER, {"dropout": 0.0, **_section(vae, "ddconfig", source)}, "ddconfig", source)
    if found["ch"] % GROUPS:
        raise ValueError(f"{source}: ch of ddconfig is {found['ch']}. It must be a multiple of {GROUPS}.")
    return found


def _checked(kinds, given, part, source):
    """The entries `given` in `part` of the configuration, each checked by its function in `kinds`."""
    missing, unknown = [name for name in kinds if name not in given], [name for name in given if name not in kinds]
    if missing or unknown:
        raise ValueError(f"{source}: {part} has missing entries: {shown(missing or 'none')}; unknown entries: "
                         f"{shown(unknown or 'none')}. Use a YAML in the official format.")
    return {name: kinds[name](value, f"{source}: {name} of {part}") for name, value in given.items()}


def _diffusion(params, size, source):
    def checked(check, name, default, *limits):
        return check(params.get(name, default), f"{source}: {name}", *limits)

    steps, cfg = (SMALL_STEPS, SMALL_CFG) if size and max(size) < SMALL else (STEPS, CFG)
    zero_snr = checked(flag, "rescale_betas_zero_snr", False)
    scaled = checked(flag, "use_dynamic_rescale", False)
    return DiffusionParams(
        parameterization=checked(word, "parameterization", "eps"),
        linear_start=checked(number, "linear_start", 1e-4, 0, 1), linear_end=checked(number, "linear_end", 2e-2, 0, 1),
        zero_snr=zero_snr, base_scale=checked(number, "base_scale", 0.7, 0, 100) if scaled else None,
        spacing="uniform_trailing" if zero_snr else "uniform", guidance_rescale=0.7 if zero_snr else 0.0,
        steps=steps, cfg=cfg)
