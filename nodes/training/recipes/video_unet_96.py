"""Recipe of the 96x96 video U-Net demo, with the latents and the towers of the 96x96 DynamiCrafter demo."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from ...video_unet.checkpoint import save
from ...video_unet.unet import new_network
from ..data import scenes
from . import video_unet as small
from .dynamicrafter_64 import SCALE_FACTOR
from .dynamicrafter_96 import PARTS
from .encodings import encode_clips, encoders

LATENT_SCALE = 0.6   # of the standardised latents: nearly all values then lie within +-3, the range x0 is clipped to
PARAMS = replace(small.PARAMS, model_channels=32, channel_mult=(2, 3))
CONFIG = replace(small.CONFIG, params=PARAMS, height=scenes.SIZE, width=scenes.SIZE, text_encoder="demo, 96x96",
                 scale_factor=SCALE_FACTOR * LATENT_SCALE)
STEPS, BATCH = 6000, 8


def train(folder: Path, encodings: dict[str, Tensor], steps: int = STEPS, batch: int = BATCH,
          on_save=None) -> nn.Module:
    """The network's EMA."""
    return small.train(new_network(PARAMS, seed=30), encodings, folder / "video_unet_96.pt", steps, LATENT_SCALE,
                       CONFIG, batch, on_save=on_save)


def export(path: Path, net: nn.Module) -> None:
    save(path, net, CONFIG)


def make_demo(folder: Path, target: Path, steps: int = STEPS, batch: int = BATCH, files: int = PARTS) -> None:
    """Train in `folder`, resuming what is there, then write the file. `files`: files of clips."""
    folder.mkdir(parents=True, exist_ok=True)
    export(target, train(folder, encode_clips(folder, *encoders(folder), files), steps, batch))
