"""Low-rank adapters (LoRA, arXiv 2106.09685), trained in place of a network's weights, for core's LoRA loaders."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..causal_wan.keys import CORE_PREFIX

DOWN, UP = "lora_down", "lora_up"


class LoraLinear(nn.Linear):
    """A linear layer plus a product of two small matrices, up @ down; its own keys stay the same."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_up(self.lora_down(x))


def add_adapters(net: nn.Module, targets: Sequence[str], rank: int, seed: int) -> None:
    """Freeze `net` and give an adapter to every linear layer with one of `targets` in its name.

    `up` starts at zero, so that the network stays the same. ValueError if no layer has such a name.
    """
    net.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    layers = {name: module for name, module in net.named_modules() if type(module) is nn.Linear}
    chosen = [module for name, module in layers.items() if any(target in name for target in targets)]
    if not chosen:
        some = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in layers})
        raise ValueError(f"lora_targets is {' '.join(targets)}: no linear layer of this network has that in its name. "
                         f"Parts of names: {', '.join(some[:20])}.")
    for layer in chosen:
        down, up = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=5 ** 0.5, generator=generator)
        nn.init.zeros_(up.weight)
        layer.__class__ = LoraLinear
        layer.lora_down, layer.lora_up = down, up


def save_adapters(path: Path, net: nn.Module, metadata: dict[str, str]) -> None:
    """Write the adapters under core's generic names, in float32, with alpha equal to the rank (strength 1 is what was
    trained)."""
    tensors = {}
    for name, module in net.named_modules():
        if isinstance(module, LoraLinear):
            for part in (DOWN, UP):
                weight = getattr(module, part).weight
                tensors[f"{CORE_PREFIX}{name}.{part}.weight"] = weight.detach().to("cpu", torch.float32).contiguous()
            tensors[f"{CORE_PREFIX}{name}.alpha"] = torch.tensor(float(module.lora_down.out_features))
    save_file(tensors, path, metadata={"format": "pt", **metadata})
