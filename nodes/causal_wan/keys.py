"""Keys of causal Wan: the network uses native Wan keys; files add prefixes.

Saving needs no mapping: core's Save Model adds the prefix "model.diffusion_model.", training writes native keys.
"""

RAW, EMA = "generator.", "generator_ema."            # the two sets of weights of an original .pt file
BESIDE = ("vae.", "text_encoders.", "clip_vision.")  # parts of an all-in-one checkpoint, for core's loaders
FRONT = {"model", "diffusion_model"}                 # prefixes of the network within a larger model
LORA_FRONT = FRONT | {"base_model"}                  # plus PEFT's prefix
CORE_PREFIX = "diffusion_model."                     # core's prefix for weights patched by a LoRA


def native_key(key: str, front: set[str] = FRONT) -> str:
    """The key as core names it: without the prefixes of the enclosing model (`front`)."""
    parts = key.split(".")
    while len(parts) > 1 and parts[0] in front:
        parts.pop(0)
    return ".".join(parts)


def core_lora_key(key: str) -> str:
    """The key of a LoRA tensor in core's generic layout, from a PEFT key or one that core reads."""
    return key if key.startswith("lora_") else CORE_PREFIX + native_key(key.replace(".default.", "."), LORA_FRONT)
