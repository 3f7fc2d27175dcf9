"""Input images: validated, resized, encoded."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 256  # pixels: models of smaller pictures know few things, and need few steps and little guidance


def check_finite(name: str, image_BHWC: Tensor) -> None:
    """Raise ValueError, mentioning `name`, for an image with NaN or infinite values."""
    if not image_BHWC.isfinite().all():
        raise ValueError(f"The {name} holds {(~image_BHWC.isfinite()).sum().item()} NaN or infinite values. Look at "
                         "the node that made it (a VAE in half precision?).")


def check_size(width: int, height: int, multiple: int) -> None:
    """Raise ValueError, with the nearest valid values, for a side that is not divisible as the VAE requires."""
    for name, side in (("width", width), ("height", height)):
        if side < multiple or side % multiple:
            below = max(multiple, side // multiple * multiple)
            raise ValueError(f"{name} is {side}: it must be a multiple of {multiple}. Nearest: {below} or "
                             f"{below + multiple}.")


def trained_size(*sources) -> tuple[int, int] | None:
    """Width and height in pixels that a model was trained with, from the first of `sources` (model, VAE) that knows."""
    return next(filter(None, (getattr(source, "trained_size", None) for source in sources)), None)


def own_size(width: int, height: int, known: tuple[int, int] | None) -> tuple[int, int]:
    """Width and height, where 0 means that of `known`, the size in training. Raises ValueError if it is None."""
    if known is None and 0 in (width, height):
        raise ValueError(f"width is {width} and height is {height}. 0 means the size that the model was trained with, "
                         "which is not known here: set both, or connect the VAE that came with the model.")
    return width or known[0], height or known[1]


def fit_image(image_BHWC: Tensor, width: int, height: int, pixel_aspect: float = 1.0) -> Tensor:
    """Scale to fill the frame and centre-crop the rest, preserving the aspect ratio. RGB, 0..1; also accepts bytes.
    `pixel_aspect`: pixel width divided by pixel height."""
    old_height, old_width, channels = image_BHWC.shape[1:]
    kept_width = min(old_width, max(1, round(old_height * width / height / pixel_aspect)))
    kept_height = min(old_height, max(1, round(old_width * pixel_aspect * height / width)))
    left, top = (old_width - kept_width) // 2, (old_height - kept_height) // 2
    image_BHWC = image_BHWC[:, top:top + kept_height, left:left + kept_width, :3]
    planes_BHW = []
    for channel in range(image_BHWC.shape[-1]):  # one at a time: all three of a very large picture would exhaust memory
        plane_BHW = image_BHWC[..., channel].float()
        if image_BHWC.dtype == torch.uint8:
            plane_BHW /= 255
        if (kept_height, kept_width) != (height, width):
            plane_BHW = F.interpolate(plane_BHW[:, None], (height, width), mode="bicubic", antialias=True)[:, 0]
            plane_BHW = plane_BHW.clamp(0, 1)
        planes_BHW.append(plane_BHW)
    return torch.stack(planes_BHW * 3 if channels == 1 else planes_BHW, dim=-1)  # grey becomes RGB


def encode_images(vae, image_BHWC: Tensor) -> Tensor:
    """Posterior means [B, 4, h, w] of single images; our VAE stacks them along time, core's image VAEs as a batch."""
    latent = vae.encode(image_BHWC)
    return latent[0].movedim(1, 0) if latent.ndim == 5 else latent
