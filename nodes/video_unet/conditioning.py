"""From given images to the conditions of the video U-Net: the frames at their places and a mask.

Tensor names end in their layout: B videos, T frames, C channels, H height, W width; T counts latent frames.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.images import check_finite, check_size, fit_image
from .config import VideoUNetConfig

NONE, FIRST, ENDS = "none", "first frames", "both ends"
GIVEN = (NONE, FIRST, ENDS)


class ClipSize(NamedTuple):
    """Size of the clip that the network sees, in pixels or latents."""

    frames: int
    height: int
    width: int


def clip_size(config: VideoUNetConfig, width: int, height: int, frames: int) -> ClipSize:
    """Size for a video of so many pixels and frames; 0 means as the model was trained. Raises ValueError, with the
    nearest valid values, for a size that the model's VAE cannot divide."""
    width, height, frames = width or config.width, height or config.height, frames or config.frames
    check_size(width, height, config.spatial_factor)
    return ClipSize(latent_frames(config, frames, "frames"), height // config.spatial_factor,
                    width // config.spatial_factor)


def latent_frames(config: VideoUNetConfig, frames: int, name: str) -> int:
    """Latent frames of `frames` video frames; the first one stands alone."""
    factor = config.temporal_factor
    if frames < 1 or (frames - 1) % factor:
        below = max(0, (frames - 1) // factor) * factor + 1
        raise ValueError(f"{name} is {frames}. This model's VAE takes 1 + {factor} n frames. Nearest: {below} or "
                         f"{below + factor}.")
    return (frames - 1) // factor + 1


def check_images(images_THWC: Tensor | None, given: str) -> None:
    """Raise ValueError if images and `given` do not fit together, or an image has NaN or infinite values."""
    if given not in GIVEN:
        raise ValueError(f"given is {given!r}. Choose one of {', '.join(GIVEN)}.")
    if given == NONE:
        if images_THWC is not None:
            raise ValueError("Images are connected, but given is none. Choose first frames or both ends, or disconnect "
                             "them for a video from text alone.")
        return
    if images_THWC is None:
        raise ValueError(f"given is {given}, but no images are connected. Connect them, or choose none for a video "
                         "from text alone.")
    if given == ENDS and len(images_THWC) != 2:
        raise ValueError(f"{len(images_THWC)} images are connected, but both ends takes 2: the first frame and the "
                         "last. Cut them with Image From Batch.")
    check_finite("image", images_THWC)


def encode(config: VideoUNetConfig, vae, images_THWC: Tensor) -> Tensor:
    """Latent frames [1, C, T, h, w] of images of the right size. Raises ValueError for a VAE whose latents
    have another shape than those of the training."""
    latent = vae.encode(images_THWC)
    if latent.ndim == 4:  # core's image VAEs stack frames as a batch
        latent = latent.movedim(0, 1)[None]
    frames, height, width = (len(images_THWC) - 1) // config.temporal_factor + 1, *images_THWC.shape[1:3]
    expected = (1, config.params.channels, frames, height // config.spatial_factor, width // config.spatial_factor)
    if latent.shape != expected:
        raise ValueError(f"This VAE makes latents {list(latent.shape)} of the images, but the model takes "
                         f"{list(expected)} [1, channels, frames, height, width]. Use the VAE that the model was "
                         "trained with (for models in pixels: the VAE of Load Video U-Net).")
    return latent


def clip_conditions(config: VideoUNetConfig, vae, images_THWC: Tensor | None, given: str, width: int, height: int,
                    frames: int, batch_size: int) -> tuple[dict[str, Tensor], Tensor]:
    """(entries for the CONDITIONING, empty latent [B, C, T, h, w]) for a video with no, the first or the end frames
    given.

    The entries are named as in core: "concat_latent_image" [1, C, T, h, w], zero where no frame is given, and
    "concat_mask" [1, 1, T, 1, 1], 0 where a frame is given. Raises ValueError for settings that do not fit together.
    """
    check_images(images_THWC, given)
    size = clip_size(config, width, height, frames)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}. It must be at least 1.")
    condition = torch.zeros(1, config.params.channels, *size)
    mask = torch.ones(1, 1, size.frames, 1, 1)
    if images_THWC is not None:
        if vae is None:
            raise ValueError("Images are connected, but no VAE to encode them. Connect the VAE that the model was "
                             "trained with (for models in pixels: the VAE of Load Video U-Net).")
        count = latent_frames(config, len(images_THWC), "The number of images") if given == FIRST else 2
        if count >= size.frames:
            raise ValueError(f"The {len(images_THWC)} given images fill {count} of {size.frames} frames, so there is "
                             "nothing left to make. Give fewer images, or a larger number of frames.")
        fitted_THWC = fit_image(images_THWC, size.width * config.spatial_factor, size.height * config.spatial_factor)
        if given == FIRST:
            condition[:, :, :count] = encode(config, vae, fitted_THWC)
            mask[:, :, :count] = 0
        else:
            for place in (0, -1):
                condition[:, :, place] = encode(config, vae, fitted_THWC[place][None])[:, :, 0]
                mask[:, :, place] = 0
    return ({"concat_latent_image": condition, "concat_mask": mask},
            torch.zeros(batch_size, config.params.channels, *size))
