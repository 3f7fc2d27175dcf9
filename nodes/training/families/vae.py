"""Training a small VAE (8x8 pixels to 16 channels) on frames of clips, for data that the VAEs at hand do not keep."""
from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...common.vae import small_vae
from ..config import TrainConfig
from ..encoding import Encoded, Encoders
from .base import Family

CHANNELS = 16
REACH = 3.0         # the decoder limits latents smoothly to +-3
SPREAD = 0.01       # weight of latents beyond that reach
SHARPNESS = 0.1     # weight of the absolute error, which blurs less than the squared one
NOISE = 0.02        # added to latents: samples are never exact


class VAETraining(Family):
    folder = "vae"

    def __init__(self, net: nn.Module, encoders: Encoders):
        self.net, self.encoders = net, encoders

    @property
    def side_multiple(self) -> int:
        return 8

    def encode(self, item: dict) -> Encoded:
        if "video" not in item:
            raise ValueError("A VAE learns from frames, and this data set holds finished latents: give the clips that "
                             "they were made of.")
        return {"video": item["video"]}

    def loss(self, net: nn.Module, batch: Encoded, generator: torch.Generator, dropout: float) -> Tensor:
        video = batch["video"]
        count, _, frames = video.shape[:3]
        frame_N = torch.randint(0, frames, (count,), generator=generator)  # one of a clip: its others look much alike
        x_NCHW = video[torch.arange(count), :, frame_N]
        z_NCHW = net.encode(x_NCHW)
        noise = torch.randn(z_NCHW.shape, generator=generator).to(z_NCHW)
        error = net.decode(z_NCHW + NOISE * noise) - x_NCHW
        beyond = (z_NCHW.abs() - REACH).clamp(min=0).square().mean()
        return error.square().mean() + SHARPNESS * error.abs().mean() + SPREAD * beyond

    @torch.no_grad()
    def sample(self, net: nn.Module, batch: Encoded, seed: int) -> dict[str, tuple[Tensor, int]]:
        x_NCHW = batch["video"].movedim(2, 1).flatten(0, 1)
        decoded = net.decode(net.encode(x_NCHW)).unflatten(0, (len(batch["video"]), -1)).movedim(1, 2)
        return {"encoded and decoded": (decoded, 0)}

    def truth(self, batch: Encoded) -> Tensor:
        return batch["video"]

    def export(self, path: Path, net: nn.Module, metadata: dict[str, str]) -> None:
        """A file for core's Load VAE, which knows the network by its keys."""
        weights = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in net.state_dict().items()}
        save_file(weights, path, metadata={"format": "pt", **metadata})


def new(encoders: Encoders, settings: TrainConfig, dataset: Dataset) -> VAETraining:
    torch.manual_seed(settings.seed)
    return VAETraining(small_vae(CHANNELS), encoders)
