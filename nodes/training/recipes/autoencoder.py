"""The autoencoder of the 96x96 demo models: AutoencoderKL trained on full frames, downsampling 8x in each dimension."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from comfy.ldm.models.autoencoder import AutoencoderKL
from torch import Tensor, nn

from ...common.demo import DYNAMICRAFTER
from ..data import scenes
from . import parts
from .dynamicrafter_64 import SCALE_FACTOR, standardise_latents
from .fast import channels_last, device, fit_compiled, make_compilable

DDCONFIG = {"double_z": True, "z_channels": 4, "resolution": scenes.SIZE, "in_channels": 3, "out_ch": 3, "ch": 64,
            "ch_mult": [1, 1, 1, 2], "num_res_blocks": 0, "attn_resolutions": [], "dropout": 0.0}
CAMERA = 0.4        # fraction of images without a single object
KL_WEIGHT = 1e-4
EDGES = 3.0         # loss weight of an outline, including 2 pixels around it
NARROW_STEPS, STEPS, BATCH = 1000, 6000, 8


def random_still(rng: Random) -> Tensor:
    """A frame [3, H, W] in [-1, 1] with an object anywhere in it, or from a camera scene."""
    if rng.random() < CAMERA:
        scene = replace(scenes.random_camera(rng), x=rng.uniform(-36, 36), y=rng.uniform(-36, 36),
                        zoom=rng.uniform(0.6, 1.2))
    else:
        scene = scenes.random_object(rng, held_out=None)
        margin = scenes.REACH * scene.radius
        scene = replace(scene, x=rng.uniform(margin, scenes.SIZE - margin), y=rng.uniform(margin, scenes.SIZE - margin))
    return scenes.draw(scene, frames=1)[0].movedim(-1, 0).float() / 127.5 - 1


def stills(count: int, seed: int) -> Tensor:
    """[count, 3, H, W], deterministic for a given seed."""
    rng = Random(seed)
    return torch.stack([random_still(rng) for _ in range(count)])


def first_autoencoder() -> nn.Module:
    """The 32-channel autoencoder of the 64x64 demo. It already knows shapes and colours, which take long to learn from
    scratch."""
    return parts.load("autoencoder", AutoencoderKL(embed_dim=4, ddconfig={**DDCONFIG, "ch": 32}), DYNAMICRAFTER)


@torch.no_grad()
def widened(narrow: nn.Module, seed: int = 1) -> nn.Module:
    """The same function with twice the channels (Net2WiderNet, arXiv 1511.05641): every channel is duplicated next to
    itself, and its outgoing weights are split unevenly between the two copies, so that they learn different things.

    GroupNorm's 32 groups over 32 channels remove every channel's mean, and with it the image's colour; over 64 channels
    the difference between the two channels of a group survives.
    """
    wide, generator = AutoencoderKL(embed_dim=4, ddconfig=DDCONFIG), torch.Generator().manual_seed(seed)
    old, new = narrow.state_dict(), wide.state_dict()
    for key, value in new.items():
        weight = old[key].repeat_interleave(len(value) // len(old[key]), dim=0)
        if value.dim() > 1 and value.shape[1] > weight.shape[1]:
            share = 0.2 + 0.6 * torch.rand(*weight.shape[:2], 1, 1, generator=generator)
            weight = torch.stack((weight * share, weight * (1 - share)), dim=2).flatten(1, 2)
        if ".attn_1.q." in key:  # dot products over twice as many channels get a smaller scale
            weight = weight * 0.5 ** 0.5
        value.copy_(weight)
    return wide


def edge_weight(images_BCHW: Tensor) -> Tensor:
    """Loss weights [B, 1, H, W]: `EDGES` near edges in brightness or colour, else 1."""
    highest, lowest = (sign * F.max_pool2d(sign * images_BCHW, 3, stride=1, padding=1) for sign in (1, -1))
    edges = ((highest - lowest).amax(1, keepdim=True) > 0.2).float()
    return 1 + (EDGES - 1) * F.max_pool2d(edges, 3, stride=1, padding=1)


def train_autoencoder(folder: Path, steps: int = STEPS, on_save=None) -> nn.Module:
    """AutoencoderKL whose latent mean has zero mean and unit variance after the usual factor 0.18215.

    It is trained on full frames only, since GroupNorm's statistics differ between a crop and a full frame. It starts
    from the widened weights of the smaller demo.
    """
    def stage(vae: nn.Module, name: str, steps: int) -> nn.Module:
        vae, rng = channels_last(make_compilable(vae)), Random()

        def encode(images: Tensor) -> Tensor:
            return vae.quant_conv(vae.encoder(images))

        def decode(latents: Tensor) -> Tensor:
            return vae.decoder(vae.post_quant_conv(latents))

        def loss_of(number: int, generator: torch.Generator, encode, decode) -> Tensor:
            rng.seed(generator.initial_seed())
            images = torch.stack([random_still(rng) for _ in range(BATCH)])
            images = images.to(device(), memory_format=torch.channels_last)
            mean, logvar = encode(images).float().chunk(2, dim=1)
            logvar = logvar.clamp(-30, 20)
            noise = torch.randn(mean.shape, generator=generator).to(mean)
            decoded = decode(mean + (0.5 * logvar).exp() * noise).float()
            divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            return (edge_weight(images) * (decoded - images).square()).mean() + KL_WEIGHT * divergence

        return fit_compiled(vae, loss_of, (encode, decode), steps=steps, lr=1e-3, checkpoint=folder / f"{name}.pt",
                            ema_decay=0.995, save_every=100, on_save=on_save)

    narrow = stage(first_autoencoder(), "autoencoder_narrow", NARROW_STEPS)
    vae = stage(widened(narrow.cpu()), "autoencoder_96", steps)
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    standardise_latents(vae, stills(256, seed=7).to(device()))
    return vae


def train_decoder(folder: Path, vae: nn.Module, images_KCHW: Tensor, steps: int, batch: int) -> nn.Module:
    """The autoencoder with its decoder trained further on images [K, 3, H, W] in [-1, 1]. The encoder stays as it is,
    and with it all that was trained on its latents."""
    vae = channels_last(make_compilable(vae))
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)

    def decode(latents: Tensor) -> Tensor:
        return vae.decoder(vae.post_quant_conv(latents))

    def loss_of(number: int, generator: torch.Generator, decode) -> Tensor:
        pick = torch.randint(0, len(images_KCHW), (batch,), generator=generator)
        images = images_KCHW[pick].to(device(), memory_format=torch.channels_last)
        with torch.no_grad():
            mean, logvar = vae.quant_conv(vae.encoder(images)).float().chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        decoded = decode(mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise).float()
        return (edge_weight(images) * (decoded - images).square()).mean()

    vae = fit_compiled(vae, loss_of, (decode,), steps=steps, lr=1e-3, checkpoint=folder / "decoder_96.pt",
                       ema_decay=0.998, save_every=100)
    return vae.to(memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def encode_frames(vae: nn.Module, frames_TCHW: Tensor) -> Tensor:
    """Scaled latents [4, T, h, w] of a clip in [-1, 1]."""
    return (vae.quant_conv(vae.encoder(frames_TCHW))[:, :4] * SCALE_FACTOR).transpose(0, 1)
