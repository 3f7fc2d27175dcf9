"""LoRAs for causal Wan: as PEFT writes them in training (LongLive's lora.pt), or in any layout that core reads."""
from __future__ import annotations

import logging
import math

import comfy.lora
import comfy.lora_convert
import comfy.utils

from ..common.files import check_kinds, take_prefix
from ..common.values import shown
from .keys import core_lora_key

log = logging.getLogger(__name__)

GENERATOR = "generator_lora."  # where LongLive's training keeps it, beside a critic's


def add_lora(patcher, checkpoint, strength=1.0):
    """A copy of MODEL `patcher` with the LoRA in a `files.Checkpoint` as a patch; `patcher` stays as it is.

    PEFT files carry no alpha: as in LongLive's it is taken to be the rank, so that strength 1 adds B @ A.
    Raises ValueError for a LoRA of which no key matches, for halves and for one made for a model of another size.
    """
    lora = comfy.lora_convert.convert_lora(core_names(checkpoint.tensors))
    _check_halves(lora, checkpoint.path)
    names = comfy.lora.model_lora_keys_unet(patcher.model, {})
    patches = comfy.lora.load_lora(lora, names, log_missing=False)
    if not patches:
        raise ValueError(f"{checkpoint.path}: none of its {len(lora)} keys is a LoRA for this model "
                         f"({', '.join(list(lora)[:3])}, ...). Choose a LoRA for Wan 2.1, written by PEFT or for "
                         "ComfyUI.")
    _check_sizes(patcher.model, patches, checkpoint.path)
    patched = patcher.clone()
    added = patched.add_patches(patches, strength)
    log.info("%s: LoRA of %d keys on %d weights, strength %g.", checkpoint.path, len(lora), len(added), strength)
    left = [key for key in lora if not _is_for(key, names)]
    if left:
        log.warning("%s: %d of %d keys match nothing in this model and are left aside: %s%s", checkpoint.path,
                    len(left), len(lora), ", ".join(left[:5]), ", ..." if len(left) > 5 else "")
    return patched


def core_names(tensors):
    """LoRA tensors with PEFT's and training wrappers' names replaced by core's generic ones; others stay."""
    tensors = take_prefix(dict(tensors), GENERATOR) or tensors
    return {core_lora_key(key): value for key, value in tensors.items()}


def _is_for(key, names):
    """Whether some beginning of a key, up to a dot, names a weight of the model."""
    return any(key[:end] in names for end, letter in enumerate(key) if letter == ".")


def _check_halves(lora, path):
    """Both halves of every pair are there, are matrices of floating-point numbers, and have one rank."""
    for down_name, up_name in (("lora_A.", "lora_B."), ("lora_down.", "lora_up.")):
        downs = {key: key.replace(down_name, up_name) for key in lora if down_name in key}
        ups = {key: key.replace(up_name, down_name) for key in lora if up_name in key}
        alone = [key for key, other in (downs | ups).items() if other not in lora]
        if alone:
            raise ValueError(f"{path}: {len(alone)} matrices of the LoRA lack their other half: "
                             f"{', '.join(alone[:3])}. The file was saved in part; get it whole.")
        check_kinds(path, {key: lora[key] for key in (*downs, *ups)})
        apart = [f"{down} is {list(lora[down].shape)}, {up} {list(lora[up].shape)}" for down, up in downs.items()
                 if min(lora[down].ndim, lora[up].ndim) < 2 or lora[down].shape[0] != lora[up].shape[1]]
        if apart:
            raise ValueError(f"{path}: {len(apart)} pairs of the LoRA do not fit each other: {'; '.join(apart[:3])}. "
                             "The rows of the first are the columns of the second, the rank. The file was changed; "
                             "get the original one.")
    for key in [key for key in lora if key.endswith(".alpha")]:
        alpha = lora[key]
        if alpha.numel() != 1 or alpha.is_complex() or not math.isfinite(alpha.item()):
            raise ValueError(f"{path}: {key} is {shown(alpha.flatten()[:3].tolist())}; it must be one number. The file "
                             "was changed; get the original one.")


def _check_sizes(model, patches, path):
    for key, patch in patches.items():
        if getattr(patch, "name", "") != "lora":
            continue
        up, down = patch.weights[:2]
        # The size of the numbers: in 4 bits the state dict holds two in one.
        made_for, here = [up.shape[0], *down.shape[1:]], list(comfy.utils.get_attr(model, key).shape)
        if made_for != here:
            raise ValueError(f"{path}: the LoRA was made for a model of another size: {key} is {here} here, "
                             f"{made_for} in the LoRA. Choose the one for this model (1.3B is 1536 wide, 14B 5120).")
