"""Inputs of a training run from the shell: data set and encoders, loaded as ComfyUI's loaders do."""
from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from torch.utils.data import Dataset

from ..causal_wan import checkpoint as causal_wan
from ..common.demo import DYNAMICRAFTER_DEMOS, demo_of
from ..common.files import Checkpoint, read_checkpoint, take_prefix
from ..dynamicrafter import checkpoint as dynamicrafter
from ..dynamicrafter.keys import VAE, has_prefix
from .config import TrainConfig
from .data.clips import Clips, MovingShapes
from .data.folders import VideoFolder
from .data.prompts import Prompts
from .data.shards import INDEX, LatentShards
from .encoding import Encoders

SD1_TEXT = "cond_stage_model.transformer."  # CLIP-L in a checkpoint of Stable Diffusion 1.x
DRAWN = 1000  # number of Moving Shapes clips if max_samples is not set


def load_dataset(settings: TrainConfig) -> Dataset:
    """Moving Shapes, a folder of videos and captions (with the class `dataset`, if one is named), latent shards, or a
    text file of prompts."""
    size = settings.size()
    if not settings.data_dir:
        return MovingShapes(settings.max_samples or DRAWN, settings.num_frames, size, seed=settings.seed,
                            mirror=settings.mirror)
    folder, most = Path(settings.data_dir).expanduser(), settings.max_samples or None
    if folder.suffix == ".txt" and folder.is_file():
        if settings.objective != "self_rollout":
            raise ValueError(f"{folder} holds prompts alone, and this training learns from clips: give a folder with "
                             "videos/ and captions/.")
        return Prompts.read(folder, settings.num_frames, size, max_samples=most)
    if not folder.is_dir():
        raise ValueError(f"data_dir: there is no folder {folder}.")
    options = {"max_samples": most, "seed": settings.seed, "mirror": settings.mirror}
    if settings.dataset:
        return load_class(settings.dataset, Clips)(folder, settings.num_frames, size, **options)
    if (folder / INDEX).exists() or next(folder.glob("shard_*"), None):
        if settings.mirror:
            raise ValueError(f"{folder} holds finished latents, which cannot be mirrored: leave mirror away.")
        return LatentShards(folder, max_samples=most)
    return VideoFolder(folder, settings.num_frames, size, **options)


def load_class(name: str, base: type) -> type:
    """The class of a name module:Class, from the present folder or an installed package. ValueError if there is none,
    or if it does not derive from `base`."""
    module, _, kind = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), kind, None)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise ValueError(f"{name}: there is no module {module} in {os.getcwd()} or in ComfyUI's Python. Give "
                         "module:Class, as my_data:MyClips for the class MyClips in my_data.py.") from error
    if not isinstance(found, type) or not issubclass(found, base):
        raise ValueError(f"{name}: {kind or 'the class'} in {module} is no subclass of {base.__name__}. Derive it from "
                         f"{base.__module__.replace(__package__.split('.')[0], 'stillmotion', 1)}.{base.__name__}.")
    return found


def load_encoders(settings: TrainConfig, pixels: bool, model: Any = None) -> Encoders:
    """VAE (None for a pixel-space network), text encoder and vision tower; files given one by one override `encoders`.
    A VAE is trained without any. With `encoders` "demo" they are those of the demo that the MODEL to be fine-tuned
    belongs to.

    Raises ValueError for a text encoder of unknown type, and for the encoders of another demo.
    """
    vae = clip = clip_vision = None
    if settings.family == "vae":
        return Encoders(None, None, None)
    if not (settings.clip and (settings.vae or pixels)):
        name = settings.encoders
        own = demo_of(model)
        if name == "demo":
            name = own or name
        elif name in DYNAMICRAFTER_DEMOS and own not in (None, name) and not settings.from_scratch:
            raise ValueError(f"encoders is {name!r}, but this model was trained with those of {own!r}: leave encoders "
                             "away, or give these.")
        vae, clip, clip_vision = _encoders_of(read_checkpoint(DYNAMICRAFTER_DEMOS.get(name, name)))
    if settings.vae:
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(settings.vae))
    if settings.clip:
        kinds = {kind.name.lower(): kind for kind in comfy.sd.CLIPType}
        if settings.clip_type not in kinds:
            raise ValueError(f"clip_type is {settings.clip_type!r}: choose one of {', '.join(kinds)}.")
        clip = comfy.sd.load_clip([settings.clip], clip_type=kinds[settings.clip_type])
    if settings.clip_vision:
        clip_vision = comfy.clip_vision.load(settings.clip_vision)
    if clip is None or vae is None and not pixels:
        raise ValueError(f"{settings.encoders} was pruned and holds no {'text encoder' if clip is None else 'VAE'}: "
                         f"name a file of its own ({'clip' if clip is None else 'vae'}), or another checkpoint.")
    return Encoders(None if pixels else vae, clip, clip_vision)


def load_scores(settings: TrainConfig) -> tuple[Any, Any]:
    """(teacher, fake score or None) of self_rollout as MODELs. ValueError for causal ones."""
    def load(path: str) -> Any:
        precise = "fp32" if settings.mixed_precision == "no" else settings.mixed_precision
        return causal_wan.load(read_checkpoint(path), weight_dtype=precise, causal=False) if path else None

    return load(settings.teacher), load(settings.fake_score)


def _encoders_of(found: Checkpoint) -> tuple[Any, Any, Any]:
    """VAE, text encoder and vision tower of a DynamiCrafter checkpoint; of a Stable Diffusion 1.x checkpoint its VAE
    and CLIP-L. A part that the file lacks is None."""
    if not has_prefix(found.tensors, SD1_TEXT):
        _, clip, clip_vision, vae = dynamicrafter.load(found)
        return vae, clip, clip_vision
    vae, text = take_prefix(found.tensors, VAE), take_prefix(found.tensors, SD1_TEXT)
    return (comfy.sd.VAE(sd=vae) if vae else None), comfy.sd.load_text_encoder_state_dicts([text]), None


def works_in_pixels(model: Any, settings: TrainConfig) -> bool:
    """Whether the network works in pixel space, without a VAE: from its header, or from the settings of a new one."""
    if model is None:
        return settings.space == "pixels"
    config = getattr(model.model, "video_unet", None)
    return config is not None and config.space == "pixels"


def choose_device(name: str) -> torch.device:
    return comfy.model_management.get_torch_device() if name == "auto" else torch.device(name)
