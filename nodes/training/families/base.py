"""The interface between a model family and the trainer, and helpers shared by all families."""
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
    """One network in training: how clips are encoded, its loss, its samples and its file format.

    `net` is plain PyTorch in float32. Subclasses define how a clip is encoded; all tensors of a batch are stacked.
    """

    net: nn.Module
    folder = "checkpoints"                      # subfolder of ComfyUI's models where the loader looks
    blocks: tuple[type[nn.Module], ...] = ()    # classes whose activations gradient checkpointing recomputes
    lora_targets: tuple[str, ...] = ()          # parts of names of layers that get adapters, unless others are given
    settled: dict[str, Any] = {}                # settings whose automatic values the family has chosen
    encoders: Encoders

    @property
    def side_multiple(self) -> int:
        """Width and height of clips in pixels must be multiples of this."""
        return 1 if self.encoders.vae is None else self.encoders.vae.spacial_compression_encode()

    def encode(self, item: dict) -> Encoded:
        """Tensors of one clip of a data set; the caption's tokens are under "text"."""
        raise NotImplementedError

    def loss(self, net: nn.Module, batch: Encoded, generator: torch.Generator, dropout: float) -> Tensor:
        """Loss of a batch; a fraction `dropout` of its conditions is dropped. Random draws are made on the CPU."""
        raise NotImplementedError

    def sample(self, net: nn.Module, batch: Encoded, seed: int) -> dict[str, tuple[Tensor, int]]:
        """{name: (latents of clips, unscaled, number of given frames)}; the last entry is compared with the true
        clips."""
        raise NotImplementedError

    def truth(self, batch: Encoded) -> Tensor | None:
        """Unscaled latents of the batch's own clips, None if it has none."""
        raise NotImplementedError

    def export(self, path: Path, net: nn.Module, metadata: dict[str, str]) -> None:
        """Write a checkpoint file for the family's loader, with `metadata` in its header."""
        raise NotImplementedError

    def export_weights(self, path: Path, net: nn.Module, metadata: dict[str, str]) -> None:
        """Write the network alone, where `export` writes more."""
        self.export(path, net, metadata)

    def load(self, path: Path) -> Any:
        """Load the file as a MODEL."""
        raise NotImplementedError

    def empty_text(self) -> Tensor:
        """[1, L, C], the replacement for a dropped caption."""
        return self.encoders.text("")[None]


def clip_latent(item: dict, encoders: Encoders) -> Tensor:
    """Unscaled latent [C, T, h, w] of an item: read from a shard, or encoded from the clip."""
    return item["latent"].float() if "latent" in item else encoders.latent(item["video"])


def first_image(item: dict) -> Tensor:
    """First frame of an item [3, H, W] in -1..1."""
    return item["reference"] if "reference" in item else item["video"][:, 0]


def chosen(count: int, share: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """Boolean mask [B], true for a fraction `share` of `count` samples."""
    return (torch.rand(count, generator=generator) < share).to(device)


def plain_weights(model, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Copy of the weights of a MODEL's network, by the network's keys, with its LoRAs merged (in float32). The MODEL is
    not changed, wherever its weights currently are."""
    weights = {}
    for key, ((weight, convert), *patches) in key_patches(model).items():
        if not key.startswith("diffusion_model.") or key.endswith(SCALES):
            continue
        weight = convert(weight, inplace=False).to("cpu", torch.float32, copy=True)
        weights[key.removeprefix("diffusion_model.")] = comfy.lora.calculate_weight(patches, weight, key).to(dtype)
    return weights


@torch.no_grad()
def ddim(predict: Callable[[Tensor, Tensor], Tensor], x_BCTHW: Tensor, alphas_cumprod: Tensor, prediction: str,
         spacing: str, clip: Clip, scale_arr: Tensor | None = None) -> Tensor:
    """Deterministic DDIM from the noise x; predict(x, t_B) calls the network with its conditions."""
    tables = make_tables(alphas_cumprod, SAMPLE_STEPS, spacing, 0.0, scale_arr)
    for index in reversed(range(len(tables))):
        step = tables.step(index)
        output = predict(x_BCTHW, torch.full((len(x_BCTHW),), step.timestep, device=x_BCTHW.device))
        x_BCTHW = ddim_step(x_BCTHW, output, prediction, step, clip, None).x
    return x_BCTHW
