"""Recipe of the 96x96 video U-Net demo, with the latents and the towers of the DynamiCrafter demo."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...ddim.schedule import make_alphas_cumprod
from ...video_unet.checkpoint import save
from ...video_unet.unet import new_network
from .. import objectives
from ..data import scenes
from . import video_unet as small
from .dynamicrafter_64 import SCALE_FACTOR
from .dynamicrafter_96 import PARTS
from .encodings import encode_clips, encoders
from .fast import channels_last, fit_compiled, make_compilable
from .laws import noisy_timesteps

LATENT_SCALE = 0.6   # of the standardised latents: nearly all values then lie within +-3, the range x0 is clipped to
PARAMS = replace(small.PARAMS, model_channels=32, channel_mult=(2, 3))
CONFIG = replace(small.CONFIG, params=PARAMS, height=scenes.SIZE, width=scenes.SIZE,
                 scale_factor=SCALE_FACTOR * LATENT_SCALE)
TASKS = (("text", 0.35), ("first", 0.1), ("past", 0.45), ("ends", 0.1))  # fraction of samples
STEPS, BATCH = 6000, 8


def draw_masks(ends_B: Tensor, generator: torch.Generator) -> Tensor:
    """Which frames are given [B, T]: none, the first, the first 2 to 8 (two show the motion), or the first and the
    last. Clips that return are always given both ends, since neither text nor past frames say that they will return."""
    names, shares = zip(*TASKS)
    task = torch.multinomial(torch.tensor(shares), len(ends_B), replacement=True, generator=generator)
    task[ends_B] = names.index("ends")
    past = torch.randint(2, scenes.FRAMES // 2 + 1, (len(ends_B),), generator=generator)
    count = torch.where(task == names.index("past"), past, (task != names.index("text")).long())
    mask_BT = torch.arange(scenes.FRAMES) < count[:, None]
    mask_BT[:, -1] |= task == names.index("ends")
    return mask_BT.float()


def train(folder: Path, encodings: dict[str, Tensor], steps: int = STEPS, on_save=None) -> nn.Module:
    """The network's EMA. One text in ten is dropped, for guidance; four in five if several frames are given, which
    carry all the information."""
    alphas = make_alphas_cumprod(CONFIG.diffusion).float()
    net = channels_last(make_compilable(new_network(PARAMS, seed=30)))

    def loss_of(number: int, generator: torch.Generator, run) -> Tensor:
        pick = torch.randint(0, len(encodings["latents"]), (BATCH,), generator=generator)
        form = torch.randint(0, scenes.HELD_OUT_FORM, (BATCH,), generator=generator)
        mask = draw_masks(encodings["ends"][pick], generator)
        dropped = torch.rand(BATCH, generator=generator) < torch.where(mask.sum(1) > 1, 0.8, 0.1)
        text = encodings["text"][torch.where(dropped, 0, encodings["caption"][pick, form])]
        z = encodings["latents"][pick].float() * LATENT_SCALE
        return objectives.video_unet_loss(run, z, mask, text, alphas, CONFIG.prediction, generator, emphasis=5,
                                          timesteps=noisy_timesteps)

    return fit_compiled(net, loss_of, (net,), steps=steps, lr=1e-3, checkpoint=folder / "video_unet.pt", seed=31,
                        ema_decay=0.998, save_every=100, on_save=on_save)


def export(path: Path, net: nn.Module) -> None:
    save(path, net, CONFIG)


def make_demo(folder: Path, target: Path) -> None:
    """Train in `folder`, resuming what is there, then write the file."""
    folder.mkdir(parents=True, exist_ok=True)
    export(target, train(folder, encode_clips(folder, *encoders(folder), PARTS)))
