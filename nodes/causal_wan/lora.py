"""LoRAs for causal Wan: as PEFT writes them in training (LongLive's lora.pt), or in any layout that core reads."""
from __future__ import annotations

import logging

import comfy.lora
import comfy.lora_convert

from ..common.files import take_prefix
from .checkpoint import FRONT, native_key

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
    _check_sizes(patcher.model.state_dict(), patches, checkpoint.path)
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
    return {key if key.startswith("lora_") else
            "diffusion_model." + native_key(key.replace(".default.", "."), FRONT | {"base_model"}): value
            for key, value in tensors.items()}


def _is_for(key, names):
    """Whether some beginning of a key, up to a dot, names a weight of the model."""
    return any(key[:end] in names for end, letter in enumerate(key) if letter == ".")


def _check_halves(lora, path):
    pairs = (("lora_A.", "lora_B."), ("lora_down.", "lora_up."))
    alone = [key for pair in pairs for one, other in (pair, pair[::-1]) for key in lora
             if one in key and key.replace(one, other) not in lora]
    if alone:
        raise ValueError(f"{path}: {len(alone)} matrices of the LoRA lack their other half: "
                         f"{', '.join(alone[:3])}. The file was saved in part; get it whole.")


def _check_sizes(weights, patches, path):
    for key, patch in patches.items():
        if getattr(patch, "name", "") != "lora":
            continue
        up, down = patch.weights[:2]
        made_for, here = [up.shape[0], *down.shape[1:]], list(weights[key].shape)
        if made_for != here:
            raise ValueError(f"{path}: the LoRA was made for a model of another size: {key} is {here} here, "
                             f"{made_for} in the LoRA. Choose the one for this model (1.3B is 1536 wide, 14B 5120).")
