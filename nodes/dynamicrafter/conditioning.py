"""From images to the three image conditions of DynamiCrafter (arXiv 2310.12190).

Condition frames (latents concatenated with the noisy clip), vision tokens (content of the image) and frame stride.
Tensor names end in their layout: B clips, H height, W width, C channels, T frames.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..common.clip import encode_tokens
from ..common.images import SMALL, check_finite, check_size, encode_images, fit_image

MODES = ("animate", "interpolate", "loop")
AREAS = (0.4, 2.5)  # of the size in training: beyond these the picture falls apart
KNOWN_DB = 25.0     # a small model's VAE brings back pictures of the kind that it knows at least so well


def check_images(image_BHWC: Tensor, image2_BHWC: Tensor | None, mode: str) -> None:
    """Raise ValueError if mode and images do not fit together, or an image has NaN or infinite values."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}. Choose one of {', '.join(MODES)}.")
    if mode == "interpolate" and image2_BHWC is None:
        raise ValueError("mode interpolate needs a second image, the last frame. Connect image2, or choose animate.")
    if mode != "interpolate" and image2_BHWC is not None:
        raise ValueError(f"mode {mode} takes one image, but image2 is connected. Disconnect it, or choose interpolate "
                         "(with the 512_interp model).")
    for name, images in (("image", image_BHWC), ("image2", image2_BHWC)):
        if images is not None:
            check_finite(name, images)


def check_counts(frames: int, batch_size: int, images: int, images2: int | None, mode: str) -> int:
    """Number of clips to make. One image is used for all clips of a batch; several images make one clip each."""
    least = 1 if mode == "animate" else 2
    if frames < least:
        raise ValueError(f"frames is {frames}. mode {mode} needs at least {least}; the models were trained with 16.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}. It must be at least 1.")
    given = {count for count in (images, images2, batch_size) if count not in (None, 1)}
    if len(given) > 1:
        raise ValueError(f"Batch sizes do not match: image {images}, image2 {images2 or 'none'}, batch_size "
                         f"{batch_size}. Each must be 1 or the same number.")
    return max(given, default=1)


def strangeness(vae, image_BHWC: Tensor, width: int, height: int, known: tuple[int, int] | None) -> str:
    """What of the input is nothing like the training, and what to do; "" if all is well or `known`, the size in
    training, is None. Only small models are asked about the picture: the VAE of a large one knows every picture."""
    if known is None:
        return ""
    found = []
    if not AREAS[0] <= width * height / (known[0] * known[1]) <= AREAS[1]:
        found.append(f"The size is {width} x {height}, but this model was trained with {known[0]} x {known[1]}: set "
                     "width and height to 0.")
    if max(known) < SMALL and image_BHWC.isfinite().all():
        picture_1HWC = fit_image(image_BHWC[:1], *known)
        back_1HWC = vae.decode(encode_images(vae, picture_1HWC)).to(picture_1HWC)
        if -10 * (picture_1HWC - back_1HWC).square().mean().clamp(min=1e-10).log10() < KNOWN_DB:
            found.append("The picture is nothing like what this small model knows (the demo: drawn pictures), so the "
                         "video will not look like it. For your own picture choose a real checkpoint in Load "
                         "DynamiCrafter: the template 'Your photo to video' says which file goes where.")
    return " ".join(found)


def condition_frames(start_BCHW: Tensor, end_BCHW: Tensor | None, frames: int) -> Tensor:
    """Latent condition [B, 4, T, h, w]: the start at each frame, or start and end at their places and zeros between."""
    if end_BCHW is None:
        return start_BCHW[:, :, None].repeat(1, 1, frames, 1, 1)
    between = torch.zeros_like(start_BCHW)[:, :, None].repeat(1, 1, frames - 2, 1, 1)
    return torch.cat((start_BCHW[:, :, None], between, end_BCHW[:, :, None]), dim=2)


def image_conditions(clip_vision, vae, image_BHWC: Tensor, image2_BHWC: Tensor | None, mode: str, width: int,
                     height: int, frames: int, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Condition frames [B, 4, T, h, w], vision tokens [B, N, W] of the start image and [1, N, W] of mid-grey.

    The vision tower sees the whole start image, uncropped, and only the start image, as in the official code.
    Raises ValueError for settings that do not fit together.
    """
    check_images(image_BHWC, image2_BHWC, mode)
    check_size(width, height, vae.spacial_compression_encode())
    clips = check_counts(frames, batch_size, len(image_BHWC), None if image2_BHWC is None else len(image2_BHWC), mode)

    def encode(images_BHWC: Tensor) -> Tensor:
        return encode_images(vae, fit_image(images_BHWC, width, height)).expand(clips, -1, -1, -1)

    start_BCHW = encode(image_BHWC)
    end_BCHW = start_BCHW if mode == "loop" else None
    if mode == "interpolate":
        end_BCHW = encode(image2_BHWC)
    tokens_BNW = encode_tokens(clip_vision, image_BHWC)
    grey_1HWC = torch.full((1, *image_BHWC.shape[1:3], 3), 0.5)
    return (condition_frames(start_BCHW, end_BCHW, frames), tokens_BNW.expand(clips, -1, -1),
            encode_tokens(clip_vision, grey_1HWC))
