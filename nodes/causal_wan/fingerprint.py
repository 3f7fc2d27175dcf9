"""Fingerprint of everything that determines a run's result, for storing and comparing."""
from __future__ import annotations

from functools import partial
from hashlib import blake2b
from itertools import accumulate
from types import FunctionType, MethodType
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.core_model import key_patches

SAMPLES = 1024     # values hashed per weight: a fine-tune changes nearly all of them
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class Fingerprint(NamedTuple):
    """`settings` apply to the whole run, `blocks[i]` to block i only; a longer run may differ in `blocks`."""

    settings: dict
    blocks: tuple[dict, ...]

    def histories(self) -> list[str]:
        """For each block, a hash of everything that determines the video up to its end."""
        return list(accumulate(self.blocks, digest, initial=digest(self.settings)))[1:]


def digest(*values) -> str:
    """Short hash of values: tensors by their bytes, containers by their items, everything else by name.

    Functions are hashed with the numbers, strings and tensors in their closures, LoRAs with their weights. Other
    state of functions and objects may change during a run and is ignored.
    """
    found = blake2b(digest_size=8)
    for value in values:
        _feed(found, value)
    return found.hexdigest()


def _feed(found, value) -> None:
    def text(*words):
        found.update((repr(words) + "\n").encode())

    if isinstance(value, PLAIN):
        text(value)
    elif isinstance(value, Tensor):
        text("tensor", value.dtype, list(value.shape))
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, dict):
        text("dict", len(value))
        for key in sorted(value, key=repr):
            _feed(found, key)
            _feed(found, value[key])
    elif isinstance(value, (list, tuple, set, frozenset)):
        text("items", len(value))
        for item in sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value:
            _feed(found, item)
    elif isinstance(value, MethodType):
        _feed(found, (value.__func__, value.__self__))
    elif isinstance(value, partial):
        _feed(found, (value.func, value.args, value.keywords))
    elif isinstance(value, FunctionType):
        text(value.__module__, value.__qualname__)
        held = [*(value.__defaults__ or ()), *(cell.cell_contents for cell in value.__closure__ or ())]
        _feed(found, [part for part in held if isinstance(part, (*PLAIN, Tensor))])
    else:
        kind = value if isinstance(value, type) else type(value)
        text(kind.__module__, kind.__qualname__)
        _feed(found, getattr(value, "weights", None))


def model_digests(patcher) -> dict:
    """Hashes of a MODEL's weights and everything applied to them: LoRAs, patches, wrappers, overrides."""
    weights, patches = {}, {}
    for key, (weight, *added) in key_patches(patcher).items():
        flat = weight[0].detach().flatten()  # paired with its convert function
        weights[key] = (list(weight[0].shape), flat[::max(1, len(flat) // SAMPLES)])
        if added:
            patches[key] = added
    return {"model": digest(weights),
            "model patches": digest(patches, patcher.object_patches, patcher.model_options, patcher.wrappers)}
