"""Select the model family and build what the trainer needs from the host's objects.

A family's module defines DEMOS (files in the pack, by name), `load_model(checkpoint, settings)` (MODEL in float32) and
`from_model(model, encoders, settings)` (its Family) or, for new networks, `new(encoders, settings, dataset)`.
"""
from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from ...common.files import read_checkpoint
from ..config import TrainConfig
from ..encoding import Encoders
from ..lora import add_adapters
from . import FAMILIES
from .base import Family


def module_of(family: str) -> ModuleType:
    return import_module(f".{family}", __package__)


def family_of(model) -> str:
    """Name of a MODEL's family; a new model is a video U-Net. ValueError for a MODEL of another node pack."""
    if model is None:
        return "video_unet"
    kind = type(model.model).__name__
    for family, of_family in FAMILIES.items():
        if kind == of_family:
            return family
    raise ValueError(f"This model ({kind}) is none that this pack trains: connect a video U-Net, DynamiCrafter or "
                     "causal Wan model of its loaders, or none for a new video U-Net.")


def load_model(settings: TrainConfig) -> Any:
    """The MODEL to fine-tune, or None for a new network."""
    if not settings.checkpoint:
        return None
    family = module_of(settings.family)
    return family.load_model(read_checkpoint(family.DEMOS.get(settings.checkpoint, settings.checkpoint)), settings)


def make_family(model, encoders: Encoders, settings: TrainConfig, dataset: Dataset) -> Family:
    """The family to train: with the network of a MODEL, or a new network if the MODEL is None. With train "lora" the
    network is frozen and has adapters.

    Raises ValueError for a MODEL of another node pack, and for encoders that do not match it.
    """
    if model is None:
        return module_of(settings.family).new(encoders, settings, dataset)
    name = family_of(model)
    if settings.train == "projector_temporal" and name != "dynamicrafter":
        raise ValueError(f"train {settings.train} is for DynamiCrafter alone: choose all or lora.")
    family = module_of(name).from_model(model, encoders, settings)
    if settings.train == "lora":
        adapt(family.net, family, settings)
    return family


def adapt(net: nn.Module, family: Family, settings: TrainConfig) -> None:
    """Freeze a network of the family and give it the adapters of the settings."""
    add_adapters(net, settings.lora_targets or family.lora_targets, settings.lora_rank, settings.seed)


def checkpoint_blocks(net: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Gradient checkpointing: every block of these classes recomputes its activations in the backward pass.

    Only the modules' classes change, not their contents, so copies of the network (its EMA) still work.
    """
    classes = {kind: type(kind.__name__, (_Recomputed, kind), {}) for kind in kinds}
    for module in net.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]


class _Recomputed:
    """Mixin placed before a block's class."""

    def forward(self, *inputs):
        if not torch.is_grad_enabled():
            return super().forward(*inputs)
        return checkpoint(super().forward, *inputs, use_reentrant=False)
