"""Initialise a video network from 2-D weights: spatial layers are copied, temporal layers start as the identity."""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...video_unet.unet import VideoUNet

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.")
RES = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
       "skip": "skip_connection"}
IMAGE_VALUES = ".to_v_ip.weight"  # image branch of DynamiCrafter's text attention: initialised to zero


class Inflated(NamedTuple):
    copied: int     # tensors
    fresh: int      # tensors left unchanged: temporal layers, and layers that the 2-D network lacks


@torch.no_grad()
def inflate(net: nn.Module, tensors: dict[str, Tensor]) -> Inflated:
    """Copy 2-D weights (keys of Stable Diffusion's U-Net, or of `net` itself) into `net` where names and shapes match.

    Weights of additional input channels (given frames, mask) are set to zero. Raises ValueError if nothing matches.
    """
    found = {_plain(key): value for key, value in tensors.items()}
    names = dict(sd_names(net)) if isinstance(net, VideoUNet) else {}
    copied = 0
    for key, target in net.state_dict().items():
        source = found.get(key)
        if source is None:
            layer, _, kind = key.rpartition(".")
            source = found.get(f"{names.get(layer)}.{kind}")
        if source is not None and _fits(source, target):
            target.zero_()
            target[:, :source.shape[1]].copy_(source) if source.ndim > 1 else target.copy_(source)
            copied += 1
        elif key.endswith(IMAGE_VALUES):
            target.zero_()
    if not copied:
        raise ValueError("None of the 2-D weights fits this network by name and shape. Give the U-Net of a Stable "
                         "Diffusion checkpoint of the same width (model_channels) and levels.")
    return Inflated(copied, len(net.state_dict()) - copied)


def _plain(key: str) -> str:
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _fits(source: Tensor, target: Tensor) -> bool:
    """Whether the shapes match, or the target is an input convolution with more channels than the 2-D one."""
    if source.shape == target.shape:
        return True
    wider = source.ndim == target.ndim == 4 and source.shape[1] < target.shape[1]
    return wider and source.shape[0] == target.shape[0] and source.shape[2:] == target.shape[2:] \
        and source.shape[1] in (3, 4)


def sd_names(net: VideoUNet) -> Iterator[tuple[str, str]]:
    """(layer of the video U-Net, layer of Stable Diffusion's U-Net) for all layers that both have: convolutions and
    norms. The attention layers are in the same places, but Stable Diffusion's have their own projections."""
    yield from (("input", "input_blocks.0.0"), ("norm", "out.0"), ("output", "out.2"),
                ("time_embed.0", "time_embed.0"), ("time_embed.2", "time_embed.2"))
    # In Stable Diffusion a down level ends with its convolution, and an up level has one more block.
    size, deepest = net.params.num_res_blocks + 1, len(net.params.channel_mult) - 1
    places = {f"middle.{i}": f"middle_block.{2 * i}" for i in (0, 1)}
    for level in range(deepest + 1):
        for i in range(net.params.num_res_blocks):
            places[f"down.{level}.blocks.{i}"] = f"input_blocks.{1 + level * size + i}.0"
            places[f"up.{level}.blocks.{i}"] = f"output_blocks.{level * size + i}.0"
        if level < deepest:
            yield f"down.{level}.resample", f"input_blocks.{(level + 1) * size}.0.op"
    for ours, theirs in places.items():
        yield from ((f"{ours}.res.{mine}", f"{theirs}.{layer}") for mine, layer in RES.items())
