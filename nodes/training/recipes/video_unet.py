"""Training of the small video U-Nets: text to video, image to video, prediction and interpolation in one network.

`video_unet_96` is the demo; the sizes and clips here are those of `video_unet_early`, for 64x64. Clips and captions are
encoded once by the DynamiCrafter demo, whose VAE and text encoder the network uses.
"""
from __future__ import annotations

import logging
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

from ...common.demo import DYNAMICRAFTER
from ...common.files import read_checkpoint
from ...ddim.schedule import make_alphas_cumprod
from ...dynamicrafter import checkpoint as dynamicrafter
from ...video_unet.config import VideoUNetConfig
from ...video_unet.unet import VideoUNetParams
from .. import objectives
from ..data import shapes as data
from .fast import channels_last, device, fit_compiled, make_compilable
from .laws import noisy_timesteps

SCALE_FACTOR = 0.18215 * 0.4  # latents of small bright shapes reach 10 standard deviations: with this, 99.9 % lie
                              # within +-3, the range that x0 is clipped to
FRAMES = 16
CLIPS = 4800
RETURNING = 0.1               # fraction of clips that move out and back; they are trained with both ends given only
PARAMS = VideoUNetParams(channels=4, model_channels=32, channel_mult=(1, 3), num_res_blocks=1, spatial_attention=(1,),
                         head_channels=16, context_dim=32, additional_condition_dim=0)
CONFIG = VideoUNetConfig(params=PARAMS, schedule="cosine", prediction="v", frames=FRAMES, height=64, width=64,
                         space="latent", scale_factor=SCALE_FACTOR, spatial_factor=8, temporal_factor=1,
                         text_encoder="demo")
TASKS = (("text", 0.35), ("first", 0.1), ("past", 0.45), ("ends", 0.1))  # fraction of samples


@torch.no_grad()
def encode_clips(folder: Path, count: int = CLIPS) -> dict[str, Tensor]:
    """Encode the clips once, with the nodes that users have: the encodings stay fixed during training.

    latents [K, 4, T, h, w] (unscaled), ends [K] (1: a clip that returns), caption [K, forms] (index into text), text
    [captions, 77, C], the empty caption first.
    """
    path = folder / "video_unet_encodings.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    demo = dynamicrafter.load(read_checkpoint(DYNAMICRAFTER), weight_dtype="fp32")
    rng, index, latents, captions = Random(2), {"": 0}, [], []
    clips = [data.random_clip(rng, returns=i < count * RETURNING) for i in range(count)]
    for clip in clips:
        latents.append(demo.vae.encode(data.draw_clip(clip, FRAMES).float() / 255)[0].half())
        captions.append([index.setdefault(clip.caption(form), len(index)) for form in range(data.HELD_OUT_FORM)])
        if len(latents) % 500 == 0:
            logging.info("encoded %d / %d clips", len(latents), count)
    text = [demo.clip.encode_from_tokens(demo.clip.tokenize(caption))[0] for caption in index]
    encodings = {"latents": torch.stack(latents), "ends": torch.tensor([clip.returns for clip in clips]),
                 "caption": torch.tensor(captions), "text": torch.stack(text)}
    encodings = {name: value.clone() for name, value in encodings.items()}
    torch.save(encodings, path)
    return encodings


def draw_masks(ends_B: Tensor, generator: torch.Generator) -> Tensor:
    """Which frames are given [B, T]: none, the first, the first 2 to 8 (two show the motion), or the first and the
    last. Clips that return are always given both ends, since neither text nor past frames say that they will return."""
    names, shares = zip(*TASKS)
    task = torch.multinomial(torch.tensor(shares), len(ends_B), replacement=True, generator=generator)
    task[ends_B] = names.index("ends")
    past = torch.randint(2, FRAMES // 2 + 1, (len(ends_B),), generator=generator)
    count = torch.where(task == names.index("past"), past, (task != names.index("text")).long())
    mask_BT = torch.arange(FRAMES) < count[:, None]
    mask_BT[:, -1] |= task == names.index("ends")
    return mask_BT.float()


def train(net: nn.Module, encodings: dict[str, Tensor], checkpoint: Path, steps: int, scale: float,
          config: VideoUNetConfig, batch: int, lr: float = 1e-3, on_save=None) -> nn.Module:
    """The network's EMA after `steps` steps on latents multiplied by `scale`.

    One text in ten is dropped, for guidance; four in five if several frames are given, which carry all the information.
    """
    alphas = make_alphas_cumprod(config.diffusion).float()
    net = channels_last(make_compilable(net))

    def loss_of(number: int, generator: torch.Generator, run) -> Tensor:
        pick = torch.randint(0, len(encodings["latents"]), (batch,), generator=generator)
        form = torch.randint(0, encodings["caption"].shape[1], (batch,), generator=generator)
        mask = draw_masks(encodings["ends"][pick], generator)
        dropped = torch.rand(batch, generator=generator) < torch.where(mask.sum(1) > 1, 0.8, 0.1)
        text = encodings["text"][torch.where(dropped, 0, encodings["caption"][pick, form])]
        z = encodings["latents"][pick].float() * scale
        return objectives.video_unet_loss(run, z.to(device()), mask.to(device()), text.to(device()), alphas,
                                          config.prediction, generator, emphasis=5, timesteps=noisy_timesteps)

    return fit_compiled(net, loss_of, (net,), steps=steps, lr=lr, checkpoint=checkpoint, seed=31, ema_decay=0.998,
                        save_every=100, on_save=on_save)
