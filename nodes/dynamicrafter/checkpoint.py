"""From a DynamiCrafter checkpoint to MODEL, CLIP, CLIP_VISION and VAE, every key accounted for.

Type and size are read from keys and shapes, or from a configuration, never from the file name.
"""
from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..common import clip as towers
from ..common.core_model import WEIGHT_DTYPES, check_weight_dtype, storage_dtype
from ..common.files import check_keys, check_kinds, take_prefix
from ..common.images import SMALL
from ..common.vae import VideoVAE, vae_shapes
from ..common.values import parse_json
from .base import make_model, make_patcher
from .config import VARIANTS, parse, published, read_yaml
from .keys import RESAMPLER, TEXT, UNET, VAE, VISION, checkpoint_keys, has_prefix, network_key

log = logging.getLogger(__name__)


# Known and ignored: the noise schedule (half precision in pruned files; ours is rebuilt in float64), also as core's
# Save nodes mark it, ...
SCHEDULE = {name: (1000,) for name in (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights", "logvar",
)} | {"scale_arr": (1400,), "v_pred": (0,), "ztsnr": (0,)}
# ... the part of each CLIP that the model does not use, ...
UNUSED = {f"{tower}{key}" for tower in (TEXT, "embedder.model.") for key in ("logit_scale", "attn_mask")} | {
    f"embedder.model.{key}" for key in ("positional_embedding", "text_projection", "token_embedding.weight",
                                        "ln_final.weight", "ln_final.bias")}
# ... and what only training needs.
TRAINING = ("model_ema.", f"{VAE}loss.")

# The first match wins; a key that contains the mark identifies the family.
FAMILIES = (
    ("Stable Video Diffusion", "model.diffusion_model.input_blocks.1.0.time_stack."),
    ("AnimateDiff (a motion module)", ".motion_modules."),
    ("a LoRA", "lora_"),
    ("a ControlNet", "control_model."),
    ("SDXL", "conditioner.embedders."),
    ("Stable Diffusion 3", "joint_blocks.0."),
    ("HunyuanVideo", "txt_in.individual_token_refiner."),
    ("Flux", "double_blocks.0.img_attn."),
    ("Wan", "blocks.0.cross_attn.norm_k."),
    ("LTX-Video", "transformer_blocks.0.scale_shift_table"),
    ("VideoCrafter (or another model without DynamiCrafter's image projector)", "model.diffusion_model.init_attn."),
    ("Stable Diffusion 1.x", "cond_stage_model.transformer."),
    ("Stable Diffusion 2.x", TEXT),
    ("an image diffusion model", UNET),
    ("a VAE", "decoder.conv_in."),
    ("a CLIP tower", "resblocks.0."),
    ("a CLIP tower", "encoder.layers.0."),
)


class Loaded(NamedTuple):
    """The parts of a checkpoint; a part that was pruned from the file is None."""

    model: Any
    clip: Any
    clip_vision: Any
    vae: Any


class Source(NamedTuple):
    """A loaded file, and the options that it was loaded with."""

    path: str
    variant: str
    yaml_path: str | None


def load(checkpoint, variant="auto", weight_dtype="auto", yaml_path=None, embedding_directory=None):
    """Turn a `files.Checkpoint` into ComfyUI's MODEL, CLIP, CLIP_VISION and VAE; `checkpoint.tensors` is emptied.

    `variant` ("auto", "256", "512", "512_interp", "1024") is a hint for files without a configuration; `yaml_path`
    an official-format YAML, which overrides the configuration in the file's header. Raises ValueError for
    another model family, for a key that is missing, unknown or of another shape, and for unknown options.
    """
    if variant not in ("auto", *VARIANTS):
        raise ValueError(f"The variant {variant!r} is unknown. Choose one of auto, {', '.join(VARIANTS)}.")
    check_weight_dtype(weight_dtype)
    tensors = checkpoint.tensors
    check_family(checkpoint)
    check_kinds(checkpoint.path, {key: value for key, value in tensors.items()
                                  if key not in UNUSED and not key.startswith(TRAINING)})
    config, clip_config = find_config(checkpoint, variant, yaml_path)
    tower_dtype = None if weight_dtype == "fp8_e4m3fn" else WEIGHT_DTYPES[weight_dtype]

    dtype = storage_dtype(weight_dtype, {key: value for key, value in tensors.items() if key.startswith(UNET)})
    model = make_model(config.unet, config.diffusion, config.scale_factor, dtype)
    network = model.diffusion_model
    text = towers.text_config(clip_config(config.text_arch)) if has_prefix(tensors, TEXT) else None
    vision = towers.vision_config(clip_config(config.vision_arch)) if has_prefix(tensors, VISION) else None
    in_file = checkpoint_keys(tensors)
    expected = {in_file(key): value.shape for key, value in network.state_dict().items()}
    _check("network (U-Net and image projector)", tensors, (UNET, RESAMPLER), expected)
    if has_prefix(tensors, VAE):
        shapes = vae_shapes(config.ddconfig, config.embed_dim)
        _check("VAE", tensors, (VAE,), _prefixed(VAE, shapes))
    if text:
        _check("text tower", tensors, (TEXT,), _prefixed(TEXT, towers.text_shapes(text)))
    if vision:
        _check("vision tower", tensors, (VISION,), _prefixed(VISION, towers.vision_shapes(vision)))
    _leave_aside(checkpoint)

    network.load_state_dict({network_key(key): _cast(tensors.pop(key), network.dtype) for key in expected}, assign=True)
    # Its origin: training writes its result into a copy of the file.
    model.source = Source(checkpoint.path, variant, yaml_path)
    model.trained_size = config.size
    vae = text_tower = vision_tower = None
    if has_prefix(tensors, VAE):
        vae = VideoVAE(take_prefix(tensors, VAE), config.ddconfig, config.embed_dim,
                       torch.float32 if weight_dtype == "fp32" else None, config.size)
        model.latent_format.preview_with(vae, config.size)
    if text:
        text_tower = towers.text_tower(take_prefix(tensors, TEXT), text, config.text_layer, tower_dtype,
                                       embedding_directory)
        text_tower.trained_size = config.size if config.size and max(config.size) < SMALL else None
    if vision:
        vision_tower = towers.VisionTower(take_prefix(tensors, VISION), vision, tower_dtype)
    return Loaded(make_patcher(model), text_tower, vision_tower, vae)


def check_family(checkpoint):
    """Raise ValueError, with the family's name, for anything but DynamiCrafter and its fine-tunes."""
    keys = checkpoint.tensors.keys()
    if any(key.startswith(f"{VAE}decoder.attn_refinement.") for key in keys):
        raise ValueError(f"{checkpoint.path} is ToonCrafter: its decoder needs both end frames as references "
                         "(first_stage_model.decoder.attn_refinement), which is not supported. Use DynamiCrafter "
                         "512_interp for two images.")
    sees_images = has_prefix(keys, RESAMPLER) or any(".to_k_ip." in key for key in keys)
    if sees_images and has_prefix(keys, f"{UNET}init_attn."):
        if re.search(r"(?<![a-z])cil(?![a-z])", Path(checkpoint.path).stem.lower()):
            log.info("%s: a CIL fine-tune by its name. It has DynamiCrafter's layout and loads like it.",
                     checkpoint.path)
        return
    family = next((name for name, mark in FAMILIES if any(mark in key for key in keys)), None)
    found = f"it looks like {family}" if family else f"its keys are unknown ({', '.join(list(keys)[:3])}, ...)"
    raise ValueError(f"{checkpoint.path} is not a DynamiCrafter checkpoint: {found}. Use model.ckpt of DynamiCrafter "
                     "256, 512, 512_interp or 1024, a pruned .safetensors of one, or a file with this pack's header.")


def find_config(checkpoint, variant, yaml_path):
    """The `CheckpointConfig`, and a function from an open_clip architecture's name to its configuration."""
    if yaml_path:
        return (parse(read_yaml(yaml_path), str(yaml_path)),
                lambda arch: towers.open_clip_config(arch, Path(yaml_path).parent))
    header = checkpoint.metadata
    if "stillmotion.config" in header:
        place = f"The header of {checkpoint.path}"
        config = parse(parse_json(header["stillmotion.config"], f"{place}, stillmotion.config,"), place)
        return config, lambda _: parse_json(header.get("stillmotion.open_clip", ""),
                                            f"{place}, stillmotion.open_clip,")
    first = checkpoint.tensors.get(f"{UNET}input_blocks.0.0.weight")
    if first is not None and first.shape[:1] != (320,):
        raise ValueError(f"{checkpoint.path}: the network is {first.shape[:1].numel()} channels wide, but the "
                         "published models are 320. Give the YAML that it was trained with.")
    found = detect_variant(checkpoint.tensors, variant)
    return parse(published(found), f"DynamiCrafter {found}"), lambda arch: towers.VIT_H


def detect_variant(tensors, hint="auto"):
    """"256", "512", "512_interp" or "1024" of a published checkpoint, from its keys.

    512 and 512_interp have the same keys: `hint` chooses between them, without it 512. A hint is also needed if the
    file lacks the buffer that distinguishes 512 from 1024. Raises ValueError for a hint that the keys contradict.
    """
    scales = tensors.get("scale_arr")
    if scales is not None:
        check_keys("dynamic rescale", {"scale_arr": scales}, {"scale_arr": SCHEDULE["scale_arr"]}, "It is damaged.")
    if scales is not None and not scales.is_meta:
        last = float(scales[-1])
        possible = next((names for value, names in ((0.7, ("512", "512_interp")), (0.3, ("1024",)))
                         if abs(last - value) < 0.01), None)
        if possible is None:
            raise ValueError(f"The checkpoint's dynamic rescale ends at {last:g}, but the published models end at 0.7 "
                             "(512) or 0.3 (1024). Give the YAML that it was trained with.")
    elif any("framestride_embed" in key or key.endswith("attn2.alpha") for key in tensors):
        possible = ("256",)
    else:
        possible = ("512", "512_interp", "1024")
        if hint == "auto":
            raise ValueError("This file lacks scale_arr, which distinguishes 512 from 1024. Choose the variant: 512, "
                             "512_interp or 1024.")
    if hint == "auto":
        return possible[0]
    if hint not in possible:
        raise ValueError(f"variant is {hint}, but the keys of this file say {' or '.join(possible)}. "
                         "Choose that, or auto.")
    return hint


def _prefixed(prefix, shapes):
    return {prefix + key: shape for key, shape in shapes.items()}


def _check(part, tensors, prefixes, expected):
    found = {key: value for key, value in tensors.items()
             if key.startswith(prefixes) and key not in UNUSED and not key.startswith(TRAINING)}
    check_keys(part, found, expected,
               "Missing keys: the file was pruned or saved in part. Get the complete file. Unknown keys or other "
               "shapes: it is another variant or a changed network. Give its own YAML, or choose the right variant.")


def _leave_aside(checkpoint):
    """Drop known unused entries; any other entry that belongs to no part is an error."""
    tensors = checkpoint.tensors
    for key in [key for key in tensors if key in UNUSED]:
        tensors.pop(key)
    training = [key for key in tensors if key.startswith(TRAINING)]
    for key in training:
        tensors.pop(key)
    if training:
        log.info("%s: ignored %d tensors of the training state (EMA, loss).", checkpoint.path, len(training))
    rest = {key: value for key, value in tensors.items()
            if not key.startswith((UNET, RESAMPLER, VAE, TEXT, VISION))}
    check_keys("rest of the file", rest, {key: SCHEDULE[key] for key in rest if key in SCHEDULE},
               "They are not part of DynamiCrafter: another model or an extension was merged into this file. Use the "
               "original file.")
    for key in rest:
        tensors.pop(key)


def _cast(value, dtype):
    """To the storage type; with 8 bits only the matrices, because norms and biases are small and would lose most."""
    if dtype == torch.float8_e4m3fn and value.ndim < 2:
        dtype = torch.bfloat16
    return value.to(dtype)
