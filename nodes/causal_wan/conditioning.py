"""Conditions of causal Wan from a start image or a clip: frames for the cache, masked latent y, frame arithmetic.

Latent frames: Wan's VAE encodes 1 + 4 n video frames to 1 + n, other VAEs one to one. Tensor names end in their layout:
B videos, T frames, C channels, H height, W width.
"""
from __future__ import annotations

from typing import NamedTuple

import comfy.model_management
import torch
from torch import Tensor

from ..common.images import check_finite, check_size, fit_image

PREFIX, CHUNK, CLAMP, CONCAT = "prefix frame", "still chunk", "in-block clamp", "concat"
MECHANISMS = ("auto", PREFIX, CHUNK, CLAMP, CONCAT)
WAN_SIZE = (832, 480)  # width and height that the published causal models were trained with
START_KEY = "stillmotion_start"  # entry of a LATENT: its given frames


class StartFrames(NamedTuple):
    """The given frames of a latent: the first `frames` latent frames (none with concat)."""

    mechanism: str
    frames: int
    block: int
    still: bool       # the given frames repeat one image; all but the first are dropped after sampling


class FramePlan(NamedTuple):
    """Frames of one run: `given` latent frames are encoded from the images, `latents` are sampled in total."""

    start: StartFrames | None  # None: text only
    given: int
    latents: int


def choose_mechanism(mechanism: str, given: int, block: int, i2v: bool) -> str:
    """Resolve the mechanism "auto": image-to-video models need y, models with one frame per block were trained to
    continue from one frame, and others accept whole blocks only."""
    if mechanism not in MECHANISMS:
        raise ValueError(f"mechanism is {mechanism!r}. Choose one of {', '.join(MECHANISMS)}.")
    if mechanism != "auto":
        return mechanism
    if i2v:
        return CONCAT
    return PREFIX if block == 1 or given > 1 and given % block else CHUNK


def latent_frames(frames: int, factor: int, name: str) -> int:
    """Latent frames of `frames` video frames: one for the first, then one per `factor` frames."""
    if frames < 1 or (frames - 1) % factor:
        below = max(0, (frames - 1) // factor) * factor + 1
        raise ValueError(f"{name} is {frames} frames. This VAE takes 1 + {factor} n. Nearest: {below} or "
                         f"{below + factor}.")
    return (frames - 1) // factor + 1


def check_length(length: int, total: int, block: int, first: int, factor: int) -> None:
    """Raise ValueError unless `total` latent frames minus the `first` one (1 or 0) are whole blocks."""
    whole, rest = divmod(total - first, block)
    if rest:
        blocks = [n for n in range(1, total - first + 1) if (total - first) % n == 0]
        lengths = [(first + n * block - 1) * factor + 1 for n in (whole, whole + 1) if n]
        after = f"{total - 1} after the first one, " if first else ""
        raise ValueError(f"length is {length} frames, which are {total} latent frames, {after}no whole blocks of "
                         f"{block}. Lengths that fit: {' or '.join(map(str, lengths))}. Blocks that fit this length: "
                         f"{', '.join(map(str, blocks))}. Or set short_last_block.")


def plan_frames(images: int, length: int, block: int, mechanism: str, i2v: bool, factor: int,
                short_last: bool) -> FramePlan:
    """Check a run's frame counts before anything is encoded. ValueErrors name valid counts."""
    if block < 1:
        raise ValueError(f"block is {block}. It must be the latent frames that the model makes at once, 3 or 1.")
    if not images:
        return plan_text(length, block, mechanism, factor, short_last)
    given, total = latent_frames(images, factor, "image"), latent_frames(length, factor, "length")
    mechanism = choose_mechanism(mechanism, given, block, i2v)
    still = mechanism == CHUNK and images == 1 and block > 1
    if given >= total:
        raise ValueError(f"The given images fill {given} latent frames, but the video has only {total}. Set a larger "
                         "length, or give fewer images.")
    first = mechanism == PREFIX or still or mechanism == CONCAT and (total - 1) % block == 0
    if not short_last:
        check_length(length, total, block, int(first), factor)
    if still:
        return FramePlan(StartFrames(mechanism, block, block, True), block, block + total - 1)
    rest = (given - 1) % block if mechanism == PREFIX else given % block if mechanism == CHUNK else 0
    if rest:
        latents = [n for n in range(1, total) if (n - (mechanism == PREFIX)) % block == 0]
        counts = ", ".join(str((n - 1) * factor + 1) for n in latents[:4])
        raise ValueError(f"{images} images make {given} latent frames, which end inside a block of {block} with "
                         f"{mechanism}. Give {counts or 'fewer'} images, or choose another mechanism or block.")
    return FramePlan(StartFrames(mechanism, 0 if mechanism == CONCAT else given, block, False), given, total)


def plan_text(length: int, block: int, mechanism: str, factor: int, short_last: bool) -> FramePlan:
    """`plan_frames` without images. Accepts lengths valid for either value of the sampler's independent_first."""
    if mechanism != "auto":
        raise ValueError(f"mechanism is {mechanism!r}, which needs an image. Connect one, or choose auto for a video "
                         "from text.")
    total = latent_frames(length, factor, "length")
    if not short_last:
        check_length(length, total, block, int((total - 1) % block == 0), factor)
    return FramePlan(None, 0, total)


def image_conditions(vae, images_THWC: Tensor | None, width: int, height: int, length: int, block: int, mechanism: str,
                     i2v: bool, short_last: bool, batch_size: int) -> tuple[dict, dict]:
    """(entries for the CONDITIONING, LATENT) for a start image, for frames of a clip to continue, or for no images.

    The entries are those of core's Wan nodes: "concat_latent_image" [1, C, T, h, w], the images followed by grey
    frames, and "concat_mask" [1, 1, T, h, w], 0 where a frame is given. They are set for image-to-video models
    (`i2v`) and with concat, and are empty otherwise.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}. It must be at least 1.")
    scale = vae.spacial_compression_encode()
    check_size(width, height, 2 * scale)
    factor = vae.temporal_compression_decode() or 1
    if images_THWC is None:
        images_THWC = torch.zeros(0, height, width, 3)
    plan = plan_frames(len(images_THWC), length, block, mechanism, i2v, factor, short_last)
    start = plan.start
    check_finite("image", images_THWC)
    frames_THWC = fit_image(images_THWC, width, height)
    if start is not None and start.still:
        frames_THWC = frames_THWC.expand((plan.given - 1) * factor + 1, -1, -1, -1)
    masked = i2v or start is not None and start.mechanism == CONCAT
    if masked:
        grey = (plan.latents - 1) * factor + 1 - len(frames_THWC)
        frames_THWC = torch.cat((frames_THWC, frames_THWC.new_full((grey, height, width, 3), 0.5)))
    samples_BCTHW = torch.zeros(batch_size, vae.latent_channels, plan.latents, height // scale, width // scale,
                                device=comfy.model_management.intermediate_device())
    entries = {}
    if len(frames_THWC):
        latent_BCTHW = vae.encode(frames_THWC)
        if start is not None:
            samples_BCTHW[:, :, :start.frames] = latent_BCTHW[:, :, :start.frames]
        if masked:
            mask_BMTHW = torch.ones(1, 1, *latent_BCTHW.shape[2:])
            mask_BMTHW[:, :, :plan.given] = 0
            entries = {"concat_latent_image": latent_BCTHW, "concat_mask": mask_BMTHW}
    return entries, {"samples": samples_BCTHW, START_KEY: start}
