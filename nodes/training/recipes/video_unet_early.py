"""Recipe of an undertrained video U-Net: 1200 steps, eps prediction, cosine schedule.

At the first sampling step alpha_bar is 2e-9, so the predicted x0 is the network's small error times 20000. Without
clipping the result is colour noise, with clipping a poor video: the shipped file demonstrates the difference.
"""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...ddim.schedule import make_alphas_cumprod
from ...video_unet.checkpoint import save
from ...video_unet.unet import new_network
from .. import objectives
from ..loop import fit
from . import video_unet as video_unet_demo
from .laws import noisy_timesteps

CONFIG = replace(video_unet_demo.CONFIG, prediction="eps",
                 params=replace(video_unet_demo.PARAMS, model_channels=16, channel_mult=(1, 2)))
STEPS, BATCH = 1200, 8
MOST_GIVEN = 8  # maximum number of given first frames; the minimum is 0


def make_early_demo(folder: Path, target: Path) -> None:
    """Train in `folder`, resuming what is there, then write the file."""
    folder.mkdir(parents=True, exist_ok=True)
    encodings = video_unet_demo.encode_clips(folder)
    net = new_network(CONFIG.params, seed=40)
    alphas = make_alphas_cumprod(CONFIG.diffusion).float()

    def loss_of(number: int, generator: torch.Generator) -> Tensor:
        pick = torch.randint(0, len(encodings["latents"]), (BATCH,), generator=generator)
        given = torch.randint(0, MOST_GIVEN + 1, (BATCH, 1), generator=generator)
        mask_BT = (torch.arange(CONFIG.frames) < given).float()
        z_BCTHW = encodings["latents"][pick].float() * CONFIG.scale_factor
        text_BLC = encodings["text"][encodings["caption"][pick, 0]]
        return objectives.video_unet_loss(net, z_BCTHW, mask_BT, text_BLC, alphas, CONFIG.prediction, generator,
                                          timesteps=noisy_timesteps)

    averaged = fit(net, loss_of, steps=STEPS, lr=2e-3, checkpoint=folder / "early.pt", seed=41, ema_decay=0.98,
                   save_every=100)
    save(target, averaged, CONFIG)
