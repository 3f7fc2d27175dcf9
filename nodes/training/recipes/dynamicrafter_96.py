"""Recipe of the 96x96 DynamiCrafter demo: four stages, each resumable, then one file in the official key layout."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ...ddim.schedule import DiffusionParams, make_alphas_cumprod, make_scale_arr
from ...dynamicrafter.resampler import ResamplerParams
from ...dynamicrafter.unet import UNetParams, VideoUNet
from .. import objectives
from ..data import scenes
from ..families.dynamicrafter import fresh_network
from . import dynamicrafter_64 as demo
from . import parts
from .autoencoder import DDCONFIG, stills, train_decoder
from .encodings import encode_clips, encoders
from .fast import channels_last, device, fit_compiled, make_compilable
from .laws import noisy_timesteps

UNET = {**demo.UNET, "model_channels": 32, "channel_mult": [2, 3], "num_head_channels": 8}
PARTS = 10            # of 400 clips each
STEPS, BATCH = 4000, 8
DECODER_STEPS, STILLS = 2000, 4096


def config() -> dict:
    """The configuration of the 64x64 demo, with this demo's sizes."""
    params = demo.CONFIG["model"]["params"]
    return {"model": {**demo.CONFIG["model"], "params": {
        **params, "image_size": [scenes.SIZE // 8, scenes.SIZE // 8],
        "unet_config": {**params["unet_config"], "params": UNET},
        "first_stage_config": {**params["first_stage_config"], "params": {"embed_dim": 4, "ddconfig": DDCONFIG}}}}}


def new_unet() -> VideoUNet:
    """The untrained network, with zero-initialised last layers so that every block starts as the identity."""
    sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in UNET.items()
             if name in UNetParams.__dataclass_fields__}
    return fresh_network(UNetParams(**sizes, resampler=ResamplerParams(**demo.RESAMPLER)), seed=3)


def first_unet() -> VideoUNet:
    """The network of the demo in the pack, whose training then goes on; an untrained one if there is none."""
    return parts.load("unet", new_unet()) if parts.has_demo() else new_unet()


def train_unet(folder: Path, encodings: dict[str, Tensor], steps: int = STEPS, batch: int = BATCH, lr: float = 1.2e-3,
               on_save=None) -> nn.Module:
    """The denoiser with its image projector, trained on cached encodings.

    Text and image are each dropped in one sample in ten, independently; a quarter of the clips, and all that return,
    are conditioned on both ends, the rest on the first frame.
    """
    schedule = DiffusionParams(parameterization="v", linear_start=0.00085, linear_end=0.012, zero_snr=True,
                               base_scale=0.7, spacing="uniform_trailing", guidance_rescale=0.7)
    alphas, scale = make_alphas_cumprod(schedule).float(), make_scale_arr(schedule.base_scale).float()
    unet = channels_last(make_compilable(first_unet()))

    def loss_of(number: int, generator: torch.Generator, run) -> Tensor:
        def chance(share: float) -> Tensor:
            return torch.rand(batch, generator=generator) < share
        pick = torch.randint(0, len(encodings["fs"]), (batch,), generator=generator)
        form = torch.randint(0, scenes.HELD_OUT_FORM, (batch,), generator=generator)
        z = encodings["latents"][pick].float()
        caption = torch.where(chance(0.1), 0, encodings["caption"][pick, form])
        tokens = torch.where(chance(0.1)[:, None, None], encodings["grey"], encodings["image"][pick])
        condition = objectives.concat_condition(z, encodings["ends"][pick] | chance(0.25))
        given = (z, condition, encodings["text"][caption], tokens, encodings["fs"][pick])
        return objectives.video_v_loss(run, *(value.to(device()) for value in given), alphas, scale, generator,
                                       emphasis=5, timesteps=noisy_timesteps)

    return fit_compiled(unet, loss_of, (unet,), steps=steps, lr=lr, checkpoint=folder / "unet_96.pt", ema_decay=0.998,
                        save_every=100, on_save=on_save).eval()


def export(path: Path, vae: nn.Module, clip: nn.Module, unet: nn.Module) -> None:
    demo.export(path, vae, clip, unet, config())


def make_demo(folder: Path, target: Path, steps: int = STEPS, batch: int = BATCH, files: int = PARTS) -> None:
    """Run all stages in `folder`, resuming what is there or in the pack's own demo, then write the file. `files`: files
    of clips."""
    folder.mkdir(parents=True, exist_ok=True)
    vae, clip = encoders(folder)
    unet = train_unet(folder, encode_clips(folder, vae, clip, files), steps, batch)
    export(target, vae, clip, unet)


def make_decoder(folder: Path, target: Path, steps: int = DECODER_STEPS, batch: int = BATCH) -> None:
    """Write the demo in the pack with its decoder trained further in `folder`. ValueError if the pack has none."""
    if not parts.has_demo():
        raise ValueError("There is no 96x96 demo whose decoder could be trained: make one with --family "
                         "dynamicrafter_96 first.")
    folder.mkdir(parents=True, exist_ok=True)
    vae, clip = encoders(folder)
    export(target, train_decoder(folder, vae, stills(STILLS, seed=11), steps, batch), clip, first_unet())
