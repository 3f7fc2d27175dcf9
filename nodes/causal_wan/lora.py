"""LoRAs for causal Wan: as PEFT saves them in training (LongLive's lora.pt), or in any layout that core reads."""
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

GENERATOR = "generator_lora."  # prefix in LongLive's training files, which also contain the critic's LoRA


def add_lora(patcher, checkpoint, strength=1.0):
    """A copy of MODEL `patcher` with the LoRA in a `files.Checkpoint` as a patch; `patcher` is not modified.

    PEFT files have no alpha: it is assumed to equal the rank, as in LongLive's, so that strength 1 adds B @ A. Raises
    ValueError for a LoRA without a matching key, with missing halves, or for a model of a different size.
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
        log.warning("%s: %d of %d keys match nothing in this model and are ignored: %s%s", checkpoint.path,
                    len(left), len(lora), ", ".join(left[:5]), ", ..." if len(left) > 5 else "")
    return patched


def core_names(tensors):
    """LoRA tensors with names from PEFT and training wrappers replaced by core's generic ones; others unchanged."""
    tensors = take_prefix(dict(tensors), GENERATOR) or tensors
    return {core_lora_key(key): value for key, value in tensors.items()}


def _is_for(key, names):
    """Whether some prefix of a key, up to a dot, names a weight of the model."""
    return any(key[:end] in names for end, letter in enumerate(key) if letter == ".")


def _check_halves(lora, path):
    """Check that both halves of each pair exist, are floating-point matrices and have the same rank."""
    for down_name, up_name in (("lora_A.", "lora_B."), ("lora_down.", "lora_up.")):
        downs = {key: key.replace(down_name, up_name) for key in lora if down_name in key}
        ups = {key: key.replace(up_name, down_name) for key in lora if up_name in key}
        alone = [key for key, other in (downs | ups).items() if other not in lora]
        if alone:
            raise ValueError(f"{path}: {len(alone)} matrices of the LoRA lack their other half: "
                             f"{', '.join(alone[:3])}. The file was saved in part. Get the complete file.")
        check_kinds(path, {key: lora[key] for key in (*downs, *ups)})
        apart = [f"{down} is {list(lora[down].shape)}, {up} {list(lora[up].shape)}" for down, up in downs.items()
                 if min(lora[down].ndim, lora[up].ndim) < 2 or lora[down].shape[0] != lora[up].shape[1]]
        if apart:
            raise ValueError(f"{path}: {len(apart)} pairs of the LoRA do not fit each other: {'; '.join(apart[:3])}. "
                             "The rows of the first must be the columns of the second (the rank). The file was "
                             "changed. Get the original one.")
    for key in [key for key in lora if key.endswith(".alpha")]:
        alpha = lora[key]
        if alpha.numel() != 1 or alpha.is_complex() or not math.isfinite(alpha.item()):
            raise ValueError(f"{path}: {key} is {shown(alpha.flatten()[:3].tolist())}. It must be one number. The file "
                             "was changed. Get the original one.")


def _check_sizes(model, patches, path):
    for key, patch in patches.items():
        if getattr(patch, "name", "") != "lora":
            continue
        up, down = patch.weights[:2]
        # The unpacked size: for 4 bits the state dict packs two values into one element.
        made_for, here = [up.shape[0], *down.shape[1:]], list(comfy.utils.get_attr(model, key).shape)
        if made_for != here:
            raise ValueError(f"{path}: the LoRA was made for a model of another size: {key} is {here} here, "
                             f"{made_for} in the LoRA. Choose the one for this model (1.3B is 1536 wide, 14B 5120).")
