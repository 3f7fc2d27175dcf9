"""Decodes a video block by block as its latents are finished, and shows it in ComfyUI's frontend.

Layouts: C channels, F latent frames, T video frames, H, W height and width. Videos in 0..1 are [T, H, W, 3].
"""
from __future__ import annotations

from io import BytesIO
from math import ceil, sqrt

import comfy.utils
import torch
import torch.nn.functional as F
from comfy.cli_args import args
from comfy.ldm.wan.vae import WanVAE
from comfy.taesd.taehv import TAEHV, MemBlock
from PIL import Image
from torch import Tensor

from ..common.video import frames_uint8

SHEET_QUALITY = 90
FRAME_MS = 80  # of the animated preview; the actual rate is set when the video is saved


def check_vae(vae, channels: int) -> None:
    """Raise ValueError unless VAE decodes latents of `channels` channels and can do so incrementally."""
    if not isinstance(vae.first_stage_model, (WanVAE, TAEHV)) and vae.latent_dim != 2:
        raise ValueError(f"The VAE is a {type(vae.first_stage_model).__name__}, which cannot be decoded block by block "
                         "here: use Wan 2.1's VAE, its tiny one (TAEHV: lighttaew2_1) or one that works frame by frame "
                         "(the demo's), or leave vae open and decode the latent afterwards.")
    if vae.latent_channels != channels:
        raise ValueError(f"The VAE decodes {vae.latent_channels} channels, this model makes {channels}: use the VAE "
                         "that belongs to the model, Wan 2.1's or the demo's.")


class LastFrames(dict):
    """Wan's feature cache: the last two input frames of each decoder layer, by layer number.

    Core keeps them in a list. Older releases concatenate a single new frame with the previous one; newer ones (0.18 on)
    decode pairs and keep only the frames of the last call. Concatenating here lets latent frames be decoded one at a
    time in all releases.
    """

    def __missing__(self, layer: int) -> None:
        return None

    def __setitem__(self, layer: int, seen_BCFHW: Tensor | str | None) -> None:  # str: a marker before the first frames
        before_BCFHW = self[layer]
        if seen_BCFHW is None:  # newer releases clear an entry before writing it
            return
        if isinstance(before_BCFHW, Tensor) and seen_BCFHW.shape[2] == 1:
            seen_BCFHW = torch.cat([before_BCFHW[:, :, -1:], seen_BCFHW], dim=2)
        super().__setitem__(layer, seen_BCFHW)


class LiveDecoder:
    """Decodes one video incrementally, with the same frames as decoding it in one call.

    Wan's VAE (arXiv 2503.20314) is causal: each layer carries its last inputs over to the next latent frame; the first
    latent frame decodes to one video frame, the others to four. Tiny VAEs (TAEHV) are causal too; their layers look one
    frame back. Other VAEs decode each frame independently. The weights must be on the device (`prepare` has core load
    them with the model, so that neither evicts the other).
    """

    def __init__(self, vae):
        self.vae, self.network, self.carried = vae, vae.first_stage_model, {}
        self.frames = self._single
        if isinstance(self.network, WanVAE):
            self.frames, self.carried = self._wan, LastFrames()
        elif isinstance(self.network, TAEHV):
            self.frames = self._tiny

    def decode(self, latent_CFHW: Tensor) -> Tensor:
        """The next frames [T, H, W, 3] as core decodes them, float32; tiny VAEs may slightly exceed 0..1."""
        vae = self.vae
        frames_TCHW = [self.frames(latent_CHW.to(vae.device, vae.vae_dtype)).to(vae.output_device).float()
                       for latent_CHW in latent_CFHW.unbind(1)]
        return vae.process_output(torch.cat(frames_TCHW)).movedim(1, -1)

    def _single(self, latent_CHW: Tensor) -> Tensor:
        return self.network.decode(latent_CHW[None])

    def _wan(self, latent_CHW: Tensor) -> Tensor:
        x_BCFHW = self.network.conv2(latent_CHW[None, :, None])
        found = self.network.decoder(x_BCFHW, feat_cache=self.carried, feat_idx=[0])
        parts_BCTHW = found if isinstance(found, list) else [found]  # newer releases return chunks of two frames
        return torch.cat(parts_BCTHW, dim=2)[0].movedim(1, 0)

    def _tiny(self, latent_CHW: Tensor) -> Tensor:
        """Run layer by layer: core's `decode` loses its state between calls and drops the first frames of each call."""
        network, carried = self.network, self.carried
        dropped = 0 if carried else network.frames_to_trim
        x_TCHW = network.process_in(latent_CHW[None, :, None])[:, :, 0]
        for number, layer in enumerate(network.decoder):
            if isinstance(layer, MemBlock):
                before_TCHW = torch.cat([carried.get(number, torch.zeros_like(x_TCHW[:1])), x_TCHW[:-1]])
                carried[number] = x_TCHW[-1:]
                x_TCHW = layer(x_TCHW, before_TCHW)
            else:
                x_TCHW = layer(x_TCHW)
        return F.pixel_shuffle(x_TCHW, network.patch_size)[dropped:]


def decode_bytes(vae, latent_shape) -> int:
    """Core's estimate of the memory to decode one latent frame, excluding the weights."""
    axes = (1, vae.latent_channels, 1) if vae.latent_dim == 3 else (1, vae.latent_channels)
    return int(vae.memory_used_decode((*axes, *latent_shape[-2:]), vae.vae_dtype))


class BlockPreview:
    """Progress over all steps; finished blocks appear in the frontend, animated if it supports that."""

    def __init__(self, steps: int):
        self.bar = comfy.utils.ProgressBar(steps)

    def on_step(self, step: int, x0: Tensor, x: Tensor, steps: int) -> None:
        """Callback with the signature that core's samplers use."""
        self.bar.update_absolute(step + 1, steps)

    def show(self, frames_THWC: Tensor) -> None:
        picture = MovingPicture(frames_THWC, args.preview_size)
        self.bar.update_absolute(self.bar.current, preview=("PNG", picture, None))


def small_frames(frames_THWC: Tensor, size: int) -> list[Image.Image]:
    """The frames as pictures with no side longer than `size`."""
    pictures = [Image.fromarray(frame) for frame in frames_uint8(frames_THWC)]
    for picture in pictures:
        picture.thumbnail((size, size))
    return pictures


def frame_sheet(frames_THWC: Tensor) -> tuple[bytes, dict]:
    """(all frames in one JPEG, row by row, and its layout: frame width, frame height, columns)."""
    pictures = small_frames(frames_THWC, args.preview_size)
    width, height = pictures[0].size
    columns = ceil(sqrt(len(pictures)))
    sheet = Image.new("RGB", (columns * width, ceil(len(pictures) / columns) * height))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    buffer = BytesIO()
    sheet.save(buffer, "JPEG", quality=SHEET_QUALITY, subsampling=0)
    return buffer.getvalue(), {"width": width, "height": height, "columns": columns}


class MovingPicture:
    """Takes the place of the single image in core's previews; saves all frames, with no side longer than `size`.

    Core sends a preview by calling `save`, so no other method is needed.
    """

    def __init__(self, frames_THWC: Tensor, size: int):
        self.frames = small_frames(frames_THWC, size)

    def save(self, file, format: str, **options) -> None:
        """Like `Image.save`; writes an animated PNG, which browsers play."""
        first, *rest = self.frames
        first.save(file, format=format, save_all=True, append_images=rest, duration=FRAME_MS, loop=0, **options)
