"""What a checkpoint file is, from its keys and shapes, without building a network."""
from __future__ import annotations

from collections import Counter

from ..causal_wan import checkpoint as wan
from ..causal_wan.foreign import FOREIGN
from ..causal_wan.keys import EMA, RAW, native_key
from ..common.files import Checkpoint
from ..dynamicrafter import checkpoint as dynamicrafter
from ..dynamicrafter.keys import RESAMPLER, TEXT, UNET, VAE, VISION, has_prefix
from ..video_unet.config import HEADER
from ..video_unet.keys import PREFIX

DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
PARTS = {"text encoder": TEXT, "vision tower": VISION, "VAE": VAE}


def family_of(checkpoint: Checkpoint) -> str | None:
    """"dynamicrafter", "causal_wan", "video_unet", or None for a file that the pack's loaders do not read."""
    keys = checkpoint.tensors.keys()
    if HEADER in checkpoint.metadata or HEADER in keys or PREFIX + HEADER in keys:
        return "video_unet"
    if has_prefix(keys, RESAMPLER) and has_prefix(keys, f"{UNET}init_attn."):
        return "dynamicrafter"
    names = {native_key(key.removeprefix(RAW).removeprefix(EMA)) for key in keys}
    if {"patch_embedding.weight", "head.modulation"} <= names and not any("lora_" in key for key in keys):
        return "causal_wan"
    return None


def describe(checkpoint: Checkpoint) -> str:
    """One line: family, variant and size, number format, parts. Raises ValueError for a damaged file of a family."""
    family, tensors = family_of(checkpoint), checkpoint.tensors
    kinds = Counter()
    for value in tensors.values():
        kinds[str(value.dtype).removeprefix("torch.")] += value.numel()
    kind = max(kinds, key=kinds.get)
    size = f"{sum(value.numel() for value in tensors.values()) / 1e6:.0f} million numbers, {DTYPES.get(kind, kind)}"
    if family == "video_unet":
        return f"Video U-Net of this pack, {size}"
    if family == "dynamicrafter":
        parts = [name for name, prefix in PARTS.items() if has_prefix(tensors, prefix)]
        return f"DynamiCrafter {_variant(checkpoint)}, {size}, {'with ' + ', '.join(parts) if parts else 'pruned'}"
    if family == "causal_wan":
        image = any("img_emb." in key for key in tensors)
        sets = [name for name, prefix in (("raw", RAW), ("ema", EMA)) if has_prefix(tensors, prefix)]
        named = wan.CAUSAL_NAMES.search(checkpoint.path.lower()) or sets or wan.read_header(
            checkpoint.metadata, checkpoint.path).causal
        return (f"{'causal Wan' if named else 'Wan (it does not say that it is causal)'}, "
                f"{'image' if image else 'text'} to video, {size}{', weights: ' + ' and '.join(sets) if sets else ''}")
    return f"{other_family(tensors) or 'not known to this pack'}, {size}"


def _variant(checkpoint):
    if "stillmotion.config" in checkpoint.metadata:
        return "of another size (as its header says)"
    if any(key.startswith(f"{VAE}decoder.attn_refinement.") for key in checkpoint.tensors):
        return "of another kind (ToonCrafter, which the pack refuses)"
    try:
        found = dynamicrafter.detect_variant(checkpoint.tensors)
    except ValueError:  # it lacks what tells them apart
        return "512, 512_interp or 1024 (the file does not say which)"
    return "512 or 512_interp" if found == "512" else found


def other_family(keys) -> str | None:
    """The name of a family that other loaders read."""
    marks = [*((name, mark) for name, mark, _ in FOREIGN), *dynamicrafter.FAMILIES]
    return next((name for name, mark in marks if any(mark in key for key in keys)), None)
