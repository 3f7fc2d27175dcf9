"""Keys of causal Wan: the network's own are native Wan keys, which files put behind prefixes.

Saving needs no map: core's Save Model writes the native keys behind "model.diffusion_model.", training as they are.
"""

RAW, EMA = "generator.", "generator_ema."            # the two sets of weights of an original .pt file
BESIDE = ("vae.", "text_encoders.", "clip_vision.")  # parts of an all-in-one checkpoint that core's loaders take
FRONT = {"model", "diffusion_model"}                 # at the front of keys: names of the network in a larger model
LORA_FRONT = FRONT | {"base_model"}                  # as PEFT names it
CORE_PREFIX = "diffusion_model."                     # of core's names for the weights that a LoRA changes


def native_key(key: str, front: set[str] = FRONT) -> str:
    """A key as core names it: without what encloses the network (`front`)."""
    parts = key.split(".")
    while len(parts) > 1 and parts[0] in front:
        parts.pop(0)
    return ".".join(parts)


def core_lora_key(key: str) -> str:
    """The key of a LoRA's tensor in core's generic layout, of one as PEFT writes it or in a layout that core reads."""
    return key if key.startswith("lora_") else CORE_PREFIX + native_key(key.replace(".default.", "."), LORA_FRONT)
