"""Keys of DynamiCrafter: the published layout of a file, and where the weights of our network lie in it."""
from collections.abc import Callable, Iterable

# Parts of a file, by how their keys begin. The image projector lies beside the U-Net; our network holds both.
UNET, RESAMPLER, VAE = "model.diffusion_model.", "image_proj_model.", "first_stage_model."
TEXT, VISION = "cond_stage_model.model.", "embedder.model.visual."
FRAME_STRIDE, OLD_FRAME_STRIDE = "fps_embedding.", "framestride_embed."  # the old name is that of 256


def file_key(key: str, old_names: bool = False) -> str:
    """The published key of a weight of `unet.VideoUNet`."""
    if key.startswith(RESAMPLER):
        return key
    return UNET + (key.replace(FRAME_STRIDE, OLD_FRAME_STRIDE) if old_names else key)


def network_key(key: str) -> str:
    """The key in `unet.VideoUNet` of a published one."""
    return key.removeprefix(UNET).replace(OLD_FRAME_STRIDE, FRAME_STRIDE)


def checkpoint_keys(found: Iterable[str]) -> Callable[[str], str]:
    """`file_key` in the names that a file with the keys `found` uses."""
    old_names = has_prefix(found, UNET + OLD_FRAME_STRIDE)
    return lambda key: file_key(key, old_names)


def has_prefix(keys: Iterable[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)
