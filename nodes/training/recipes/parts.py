"""Parts of the 96x96 DynamiCrafter demo in its file: what other recipes use, and what its training goes on from."""
from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from ...common.demo import DYNAMICRAFTER_96
from ...common.files import read_checkpoint

AUTOENCODER, TEXT, VISION, UNET = ("first_stage_model.", "cond_stage_model.model.", "embedder.model.",
                                   "model.diffusion_model.")
TABLE = f"{TEXT}token_embedding.weight"


def keys_of(part: str, net: nn.Module) -> dict[str, str]:
    """{key in the file: key of the network} for "autoencoder", "towers" or "unet". The vision file's own copy of the
    text tower is left out."""
    def prefix(key: str) -> str:
        if part == "autoencoder":
            return AUTOENCODER
        if part == "towers":
            return VISION if key.startswith("visual.") else TEXT
        return "" if key.startswith("image_proj_model.") else UNET
    return {prefix(key) + key: key for key in net.state_dict()}


def tensors_of(part: str, net: nn.Module) -> dict[str, Tensor]:
    """The network's weights in fp16, with the keys of the file."""
    weights = net.state_dict()
    return {name: weights[key].half().contiguous() for name, key in keys_of(part, net).items()}


def has_demo() -> bool:
    return DYNAMICRAFTER_96.exists()


def load(part: str, net: nn.Module, path: Path | None = None) -> nn.Module:
    """Load the weights of a demo file (default: the 96x96 one) into the network."""
    found = read_checkpoint(path or DYNAMICRAFTER_96).tensors
    net.load_state_dict({key: found[name].float() for name, key in keys_of(part, net).items()})
    return net
