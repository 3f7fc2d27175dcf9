"""What a family's adapter offers the trainer, and what all of them use."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.lora
import torch
from torch import Tensor, nn

from ...common.core_model import key_patches
from ...common.quantized import SCALES
from ...ddim.schedule import make_tables
from ...ddim.step import Clip, ddim_step
from ..encoding import Encoded, Encoders

SAMPLE_STEPS = 20
NO_CLIP, CLIP_3 = Clip("off", 3.0, False), Clip("static", 3.0, True)


class Family:
    """One network in training: what a batch of it is, its loss, its samples and its file.

    `net` is plain PyTorch in float32. Subclasses say what is encoded of a clip; all tensors of a batch are stacked.
    """

    net: nn.Module
    folder = "checkpoints"                      # of ComfyUI's models, where the loader looks
    blocks: tuple[type[nn.Module], ...] = ()    # classes whose activations gradient checkpointing computes again
    encoders: Encoders

    @property
    def side_multiple(self) -> int:
        """Width and height of clips in pixels must be multiples of it."""
        return 1 if self.encoders.vae is None else self.encoders.vae.spacial_compression_encode()

    def encode(self, item: dict) -> Encoded:
        """Tensors of one clip of a data set; the caption's under "text"."""
        raise NotImplementedError

    def loss(self, net: nn.Module, batch: Encoded, generator: torch.Generator, dropout: float) -> Tensor:
        """Loss of a batch; a fraction `dropout` of its conditions is dropped. Drawn on the CPU, for any device."""
        raise NotImplementedError

    def sample(self, net: nn.Module, batch: Encoded, seed: int) -> dict[str, tuple[Tensor, int]]:
        """{what: (latents of clips, not scaled, number of their frames that were given)}, the one that is compared
        with the true clips last."""
        raise NotImplementedError

    def truth(self, batch: Encoded) -> Tensor:
        """Latents of the batch's own clips, not scaled."""
        raise NotImplementedError

    def export(self, path: Path, net: nn.Module, metadata: dict[str, str]) -> None:
        """Write the file `path`, which the family's loader takes, with `metadata` in its header."""
        raise NotImplementedError

    def load(self, path: Path) -> Any:
        """The file as MODEL."""
        raise NotImplementedError

    def empty_text(self) -> Tensor:
        """[1, L, C], what replaces a dropped caption."""
        return self.encoders.text("")[None]


def clip_latent(item: dict, encoders: Encoders) -> Tensor:
    """Latent [C, T, h, w] of an item, not scaled: shards hold it, other items their clip."""
    return item["latent"].float() if "latent" in item else encoders.latent(item["video"])


def first_image(item: dict) -> Tensor:
    """The image [3, H, W] in -1..1 that an item begins with."""
    return item["reference"] if "reference" in item else item["video"][:, 0]


def chosen(count: int, share: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """True for a `share` of `count` samples [B]."""
    return (torch.rand(count, generator=generator) < share).to(device)


def plain_weights(model) -> dict[str, Tensor]:
    """The weights of a MODEL's network in float32 by the network's keys, copied, with its LoRAs in them. The MODEL
    itself stays as it is, wherever its weights are at the moment."""
    weights = {}
    for key, ((weight, convert), *patches) in key_patches(model).items():
        if not key.startswith("diffusion_model.") or key.endswith(SCALES):
            continue
        weight = convert(weight, inplace=False).to("cpu", torch.float32, copy=True)
        weights[key.removeprefix("diffusion_model.")] = comfy.lora.calculate_weight(patches, weight, key)
    return weights


@torch.no_grad()
def ddim(predict: Callable[[Tensor, Tensor], Tensor], x_BCTHW: Tensor, alphas_cumprod: Tensor, prediction: str,
         spacing: str, clip: Clip, scale_arr: Tensor | None = None) -> Tensor:
    """Deterministic DDIM from the noise x; predict(x, t_B) is the network with its conditions."""
    tables = make_tables(alphas_cumprod, SAMPLE_STEPS, spacing, 0.0, scale_arr)
    for index in reversed(range(len(tables))):
        step = tables.step(index)
        output = predict(x_BCTHW, torch.full((len(x_BCTHW),), step.timestep, device=x_BCTHW.device))
        x_BCTHW = ddim_step(x_BCTHW, output, prediction, step, clip, None).x
    return x_BCTHW
