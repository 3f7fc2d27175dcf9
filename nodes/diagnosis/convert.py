"""A checkpoint as a .safetensors file: what training left behind is dropped, the numbers in another format."""
from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..causal_wan import checkpoint as wan
from ..causal_wan.keys import EMA, RAW
from ..common.files import Checkpoint
from ..common.saving import replacing
from ..dynamicrafter import checkpoint as dynamicrafter
from ..dynamicrafter.keys import RESAMPLER, TEXT, UNET, VAE, VISION
from .identify import family_of

DTYPES = {"keep": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def convert(checkpoint: Checkpoint, target: str | Path, dtype: str = "keep", encoders: bool = True,
            weights: str = "auto") -> None:
    """Write the checkpoint to the new .safetensors file `target`, whole or not at all; `checkpoint.tensors` is emptied.

    Dropped are optimizer states, averages that were not chosen (`weights`: auto, ema, raw of an original causal Wan
    file) and DynamiCrafter's noise schedule, which the loaders rebuild. encoders False also drops DynamiCrafter's text
    encoder and vision tower. dtype: keep, fp32, fp16, bf16. Raises ValueError for a target that is there already or
    has another suffix, for numbers that do not fit dtype, and for dtype with a file in 8 or 4 bits.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} must end in .safetensors.")
    if target.exists():
        raise ValueError(f"{target} is there already. Give another name, or move it away.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r} was given; allowed are {', '.join(DTYPES)}.")
    family = family_of(checkpoint)
    if not encoders and family != "dynamicrafter":
        raise ValueError(f"{checkpoint.path} is no DynamiCrafter checkpoint, so it has no encoders to leave out.")
    metadata = {"format": "pt", **checkpoint.metadata}
    if family == "causal_wan":
        metadata |= _causal_header(checkpoint)
        tensors = wan.pick(checkpoint, weights)
    elif family == "dynamicrafter":
        tensors = _pruned(checkpoint.tensors, encoders)
    else:
        tensors = dict(checkpoint.tensors)
    checkpoint.tensors.clear()
    with replacing(target) as content:
        save_file(_cast(tensors, dtype, checkpoint.path), content, metadata=metadata)


def _pruned(tensors, encoders):
    parts = (UNET, RESAMPLER, VAE, TEXT, VISION) if encoders else (UNET, RESAMPLER, VAE)
    return {key: value for key, value in tensors.items() if key == "scale_arr" or key.startswith(parts)
            and not key.startswith(dynamicrafter.TRAINING) and key not in dynamicrafter.UNUSED}


def _causal_header(checkpoint):
    """Keeps the statement that the weights are causal, which the original file makes by its keys or its name."""
    named = wan.CAUSAL_NAMES.search(checkpoint.path.lower()) or any(
        key.startswith((RAW, EMA)) for key in checkpoint.tensors)
    if not named:
        return {}
    config = json.loads(checkpoint.metadata.get("config", "{}"))
    config.setdefault("transformer", {})["causal_ar"] = True
    return {"config": json.dumps(config)}


def _cast(tensors, dtype, path):
    if dtype != "keep":
        packed = [key for key, value in tensors.items() if value.dtype not in PLAIN and value.ndim > 1]
        if packed:
            raise ValueError(f"{path} holds {len(packed)} weights in 8 or 4 bits ({packed[0]}), whose scale factors "
                             "belong to them. Choose keep, or convert the original file.")
    made, storages = {}, set()
    for key in list(tensors):
        value = tensors.pop(key)
        if dtype != "keep" and value.dtype in PLAIN:
            cast = value.to(DTYPES[dtype])
            if cast.isinf().any() and not value.isinf().any():
                raise ValueError(f"{path}: {key} has numbers up to {value.abs().max():g}, too large for {dtype}. "
                                 "Choose bf16 or fp32.")
            value = cast
        value = value.contiguous()
        storage = value.untyped_storage().data_ptr()
        made[key] = value.clone() if storage in storages else value  # .safetensors knows no shared weights
        storages.add(storage)
    return made
