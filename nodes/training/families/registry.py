"""From the host's parts to what the trainer trains."""
from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from . import causal_wan, dynamicrafter, video_unet
from .base import Family
from ..config import TrainConfig
from ..encoding import Encoders

FROM_MODEL = {"VideoUNetModel": video_unet, "DynamiCrafterModel": dynamicrafter, "CausalWanModel": causal_wan}


def make_family(model, encoders: Encoders, settings: TrainConfig, dataset: Dataset) -> Family:
    """What is trained: the network of a MODEL, or a new video U-Net where it is None.

    Raises ValueError for a MODEL of another pack, and for encoders that do not belong to it.
    """
    if model is None:
        return video_unet.new(encoders, settings, dataset)
    kind = type(model.model).__name__
    if kind not in FROM_MODEL:
        raise ValueError(f"This model ({kind}) is none that this pack trains: connect a video U-Net, DynamiCrafter or "
                         "causal Wan model of its loaders, or none for a new video U-Net.")
    if settings.train != "all" and kind != "DynamiCrafterModel":
        raise ValueError(f"train {settings.train} is for DynamiCrafter alone; this model is trained whole: choose all.")
    return FROM_MODEL[kind].from_model(model, encoders, settings)


def checkpoint_blocks(net: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Let every block of these classes compute its activations again in the backward pass instead of keeping them.

    The modules change their class, not their contents, so copies of the network (its moving average) stay whole.
    """
    classes = {kind: type(kind.__name__, (_Recomputed, kind), {}) for kind in kinds}
    for module in net.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]


class _Recomputed:
    """Put before a block's class."""

    def forward(self, *inputs):
        if not torch.is_grad_enabled():
            return super().forward(*inputs)
        return checkpoint(super().forward, *inputs, use_reentrant=False)
