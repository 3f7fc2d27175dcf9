"""Weights of finished (or the latest) stages, stored in the pack in fp16, so that training can resume anywhere."""
from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

FOLDER = Path(__file__).parents[2] / "demo" / "stages"
TABLE, ROWS = "token_embedding.weight", ".rows"


def save(name: str, net: nn.Module, step: int) -> None:
    """Save weights trained for `step` steps. Of an embedding table only the nonzero rows are stored."""
    FOLDER.mkdir(exist_ok=True)
    weights = {}
    for key, value in net.state_dict().items():
        if key.endswith(TABLE):
            weights[key + ROWS] = used = value.abs().sum(1).nonzero()[:, 0]
            value = value[used]
        weights[key] = value.half().contiguous()
    save_file(weights, FOLDER / f"{name}.safetensors", metadata={"format": "pt", "step": str(step)})


def has(name: str) -> bool:
    return (FOLDER / f"{name}.safetensors").exists()


def load(name: str, net: nn.Module) -> nn.Module:
    """Load the stored weights into the network. Raises FileNotFoundError if there are none."""
    kept, weights = load_file(FOLDER / f"{name}.safetensors"), {}
    for key, value in net.state_dict().items():
        weights[key] = kept[key].float()
        if key.endswith(TABLE):
            weights[key] = torch.zeros_like(value).index_copy(0, kept[key + ROWS], weights[key])
    net.load_state_dict(weights)
    return net
