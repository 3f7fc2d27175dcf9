"""Images on their way into a model: checked, brought to a size, encoded."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def check_finite(name: str, image_BHWC: Tensor) -> None:
    """Raise ValueError, with `name`, for an image with NaN or infinite values."""
    if not image_BHWC.isfinite().all():
        raise ValueError(f"The {name} holds {(~image_BHWC.isfinite()).sum().item()} NaN or infinite values. Look at "
                         "the node that made it (a VAE in half precision?).")


def check_size(width: int, height: int, multiple: int) -> None:
    """Raise ValueError, with the nearest good values, for a side that the VAE cannot divide."""
    for name, side in (("width", width), ("height", height)):
        if side < multiple or side % multiple:
            below = max(multiple, side // multiple * multiple)
            raise ValueError(f"{name} is {side}: it must be a multiple of {multiple}. Nearest: {below} or "
                             f"{below + multiple}.")


def fit_image(image_BHWC: Tensor, width: int, height: int) -> Tensor:
    """Scale until the frame is filled and cut what sticks out evenly, so that nothing is stretched. RGB, 0..1."""
    image_BCHW = image_BHWC[..., :3].movedim(-1, 1).float()
    if image_BCHW.shape[1] == 1:  # grey
        image_BCHW = image_BCHW.expand(-1, 3, -1, -1)
    old_height, old_width = image_BCHW.shape[2:]
    if (old_width, old_height) != (width, height):
        kept_width = min(old_width, max(1, round(old_height * width / height)))
        kept_height = min(old_height, max(1, round(old_width * height / width)))
        left, top = (old_width - kept_width) // 2, (old_height - kept_height) // 2
        image_BCHW = image_BCHW[:, :, top:top + kept_height, left:left + kept_width]
        image_BCHW = F.interpolate(image_BCHW, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    return image_BCHW.movedim(1, -1)


def encode_images(vae, image_BHWC: Tensor) -> Tensor:
    """Posterior means [B, 4, h, w] of single images; our VAE stacks them over time, core's image VAEs as a batch."""
    latent = vae.encode(image_BHWC)
    return latent[0].movedim(1, 0) if latent.ndim == 5 else latent
