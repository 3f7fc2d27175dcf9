"""A video decoded block by block, as its latents are finished, and shown on ComfyUI's page.

Layouts: C channels, F latent frames, T video frames, H, W height and width. Videos in 0..1 are [T, H, W, 3].
"""
from __future__ import annotations

from functools import partial

import comfy.utils
import torch
from comfy.cli_args import args
from comfy.ldm.wan import vae as wan_vae
from comfy.ldm.wan.vae import WanVAE
from PIL import Image
from torch import Tensor

from ..common.video import frames_uint8

# how many layers of the decoder carry frames over; renamed in 0.18
count_layers = getattr(wan_vae, "count_conv3d", None) or wan_vae.count_cache_layers
FRAME_MS = 80  # of the moving preview; the true rate is chosen when the video is saved


def check_vae(vae, channels: int) -> None:
    """Raise ValueError unless VAE decodes latents of `channels` channels and can do so piece by piece."""
    if not isinstance(vae.first_stage_model, WanVAE) and vae.latent_dim != 2:
        raise ValueError(f"The VAE is a {type(vae.first_stage_model).__name__}, which cannot be decoded block by block "
                         "here: use Wan 2.1's VAE or one that works frame by frame (the demo's), or leave vae open and "
                         "decode the latent afterwards.")
    if vae.latent_channels != channels:
        raise ValueError(f"The VAE decodes {vae.latent_channels} channels, this model makes {channels}: use the VAE "
                         "that belongs to the model, Wan 2.1's or the demo's.")


class LiveDecoder:
    """Decodes one video in pieces: their frames together are those of decoding it whole.

    Wan's VAE (arXiv 2503.20314) is causal: each layer carries its last inputs over to the next latent frame, and of
    the first latent frame it makes one video frame, of the others four. Other VAEs take every frame by itself. The
    weights must be on the device (`prepare` has core load them with the model, so that neither pushes the other out).
    """

    def __init__(self, vae):
        self.vae, self.network = vae, vae.first_stage_model
        self.causal = isinstance(self.network, WanVAE)
        self.carried = [None] * count_layers(self.network.decoder) if self.causal else None

    def decode(self, latent_CFHW: Tensor) -> Tensor:
        """The next frames [T, H, W, 3] in 0..1, float32."""
        vae = self.vae
        frames_CTHW = [self._frame(latent_CHW.to(vae.device, vae.vae_dtype)).to(vae.output_device).float()
                       for latent_CHW in latent_CFHW.unbind(1)]
        return vae.process_output(torch.cat(frames_CTHW, dim=1)).movedim(0, -1)

    def _frame(self, latent_CHW: Tensor) -> Tensor:
        if not self.causal:
            return self.network.decode(latent_CHW[None]).movedim(0, 1)
        x_BCFHW = self.network.conv2(latent_CHW[None, :, None])
        return self.network.decoder(x_BCFHW, feat_cache=self.carried, feat_idx=[0])[0]


def decode_bytes(vae, latent_shape) -> int:
    """Memory that decoding one latent frame takes beside the weights, as core reckons."""
    height, width = latent_shape[-2:]
    axes = (1, vae.latent_channels, 1) if isinstance(vae.first_stage_model, WanVAE) else (1, vae.latent_channels)
    return int(vae.memory_used_decode((*axes, height, width), vae.vae_dtype))


class BlockPreview:
    """Progress over all steps; finished blocks appear on the page as they come, moving where it plays them."""

    def __init__(self, steps: int):
        self.bar = comfy.utils.ProgressBar(steps)

    def on_step(self, step: int, x0: Tensor, x: Tensor, steps: int) -> None:
        """Callback in the form of core's samplers."""
        self.bar.update_absolute(step + 1, steps)

    def show(self, frames_THWC: Tensor) -> None:
        picture = moving_picture(frames_THWC, args.preview_size)
        self.bar.update_absolute(self.bar.current, preview=("PNG", picture, None))


def moving_picture(frames_THWC: Tensor, size: int) -> Image.Image:
    """The first frame, no side longer than `size`; saved as PNG it holds the others, too, and browsers play it."""
    frames = [Image.fromarray(frame) for frame in frames_uint8(frames_THWC)]
    for frame in frames:
        frame.thumbnail((size, size))
    # The host's only way of sending is to save the picture, and its previews have room for one.
    frames[0].save = partial(frames[0].save, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
    return frames[0]
