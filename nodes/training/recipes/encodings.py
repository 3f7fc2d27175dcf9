"""Drawn clips, encoded once by the autoencoder and the towers, as they stay fixed while the denoiser is trained."""
from __future__ import annotations

import logging
from pathlib import Path
from random import Random

import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from ..data import scenes
from . import parts
from .autoencoder import DDCONFIG, encode_frames, train_autoencoder
from .dynamicrafter_64 import OPEN_CLIP, image_features, text_features
from .fast import autocast, device
from .towers import train_towers

PART = 400          # clips per file
CAMERA = 0.25       # fraction of clips without a single object
RETURNING = 0.1     # fraction of clips that move out and back, for loops


def encoders(folder: Path) -> tuple[nn.Module, nn.Module]:
    """Autoencoder and towers of the demo in the pack; trained in `folder` if there is none."""
    if parts.has_demo():
        vae, clip = AutoencoderKL(embed_dim=4, ddconfig=DDCONFIG), CLIP(**OPEN_CLIP)
        parts.load("autoencoder", vae)
        parts.load("towers", clip)
    else:
        vae, clip = train_autoencoder(folder), train_towers(folder)
    return vae.to(device()).eval(), clip.to(device()).eval()


def random_scene(rng: Random) -> scenes.Scene:
    returns = rng.random() < RETURNING
    return (scenes.random_camera if rng.random() < CAMERA else scenes.random_object)(rng, returns=returns)


@torch.no_grad()
def encode_drawn(vae: nn.Module, frames_TCHW: Tensor) -> Tensor:
    """Scaled latents [4, T, h, w] of a clip in [-1, 1], in fp16 in main memory."""
    frames_TCHW = frames_TCHW.to(device(), memory_format=torch.channels_last)
    with autocast():
        return encode_frames(vae, frames_TCHW).half().cpu()


@torch.no_grad()
def encode_captions(clip: nn.Module, tokens_KL: Tensor) -> Tensor:
    """[K, L, C]"""
    return torch.cat([text_features(clip, chunk.to(device())).cpu() for chunk in tokens_KL.split(500)])


@torch.no_grad()
def encode_part(number: int, vae: nn.Module, clip: nn.Module) -> dict[str, Tensor]:
    """Encode part `number` of all clips; deterministic.

    latents [K, 4, T, h, w] (scaled), image [K, N, W] vision tokens of the first frame, fs [K], ends [K] (1: a clip
    that returns, for both-ends conditioning only), tokens [K, forms, L] of the captions, camera [K] (1: no object).
    """
    rng, found = Random(1000 + number), []
    tokenize = SimpleTokenizer(context_length=77)
    for _ in range(PART):
        scene = random_scene(rng)
        frames_TCHW = scenes.draw(scene).movedim(-1, 1).float() / 127.5 - 1
        image = image_features(clip, frames_TCHW[:1].to(device()))[0].cpu()
        found.append({"latents": encode_drawn(vae, frames_TCHW), "image": image,
                      "fs": torch.tensor(scene.fs), "ends": torch.tensor(scene.returns),
                      "tokens": tokenize([scene.caption(form) for form in range(scenes.HELD_OUT_FORM)]).int(),
                      "camera": torch.tensor(isinstance(scene, scenes.CameraScene))})
    return {name: torch.stack([item[name] for item in found]).contiguous() for name in found[0]}


@torch.no_grad()
def encode_clips(folder: Path, vae: nn.Module, clip: nn.Module, count: int) -> dict[str, Tensor]:
    """Parts 0 to `count` - 1 concatenated; missing files are created. Also text [captions, L, C], with the empty
    caption first, caption [K, forms] (index into text) and grey [1, N, W], the vision tokens of a grey image."""
    vae, made = vae.to(memory_format=torch.channels_last), []
    for number in range(count):
        path = folder / f"encodings_{number:02}.pt"
        if not path.exists():
            torch.save(encode_part(number, vae, clip), path)
            logging.info("encoded part %d of %d", number + 1, count)
        made.append(torch.load(path, weights_only=True))
    encodings = {name: torch.cat([part[name] for part in made]) for name in made[0]}
    tokens = encodings.pop("tokens")
    empty = SimpleTokenizer(context_length=77)([""]).int()
    captions, index = torch.cat((empty, tokens.flatten(0, 1))).unique(dim=0, return_inverse=True)
    text = encode_captions(clip, captions)
    order = torch.arange(len(text))
    order[0], order[index[0]] = index[0], 0  # swap the empty caption with the first
    grey = image_features(clip, torch.zeros(1, 3, scenes.SIZE, scenes.SIZE, device=device())).cpu()
    return encodings | {"text": text[order], "caption": order[index[1:]].view(tokens.shape[:2]), "grey": grey}
