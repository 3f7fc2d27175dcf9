"""Image autoencoders on video latents: ComfyUI's own VAE with the frame axis folded into the batch."""

import copy
import json
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.taesd.taesd
import comfy.utils
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL

from .files import read_checkpoint, take_prefix

# Pixels processed between progress updates (and interrupt checks): one frame of 512 x 320, or 40 of 64 x 64.
# ComfyUI splits them further if less memory is free.
PIXELS_PER_TICK = 512 * 320


def vae_shapes(ddconfig, embed_dim):
    """Key -> shape of the autoencoder that an official `ddconfig` describes."""
    with torch.device("meta"):
        network = AutoencoderKL(ddconfig=dict(ddconfig), embed_dim=embed_dim)
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


class FoldedFrames:
    """Mixin for an image VAE class that adds support for latents [B, C, T, h, w].

    Encoding N images [N, H, W, C] gives one clip [1, C, N, h, w], the posterior mean; decoding 5-D latents gives
    [B, T, H, W, C] in 0..1, decoding 4-D latents gives images as usual.
    """

    def encode(self, pixel_samples, *args, **kwargs):
        encode = super().encode

        def chunked(frames_NHWC):
            _, height, width, _ = frames_NHWC.shape
            return _in_chunks(lambda chunk: encode(chunk, *args, **kwargs), frames_NHWC, height * width)

        return self._fold_pixels(chunked, pixel_samples)

    def encode_tiled(self, pixel_samples, *args, **kwargs):
        encode = super().encode_tiled
        return self._fold_pixels(lambda frames: encode(frames, *args, **_spatial(kwargs)), pixel_samples)

    def decode(self, samples_in, *args, **kwargs):
        decode = super().decode

        def chunked(frames_NCHW):
            _, _, height, width = frames_NCHW.shape
            pixels = height * width * self.upscale_ratio ** 2
            return _in_chunks(lambda chunk: decode(chunk, *args, **kwargs), frames_NCHW, pixels)

        return self._fold_latents(chunked, samples_in)

    def decode_tiled(self, samples, *args, **kwargs):
        decode = super().decode_tiled
        return self._fold_latents(lambda frames: decode(frames, *args, **_spatial(kwargs)), samples)

    def _fold_pixels(self, encode, pixels):
        clips = len(pixels) if pixels.ndim == 5 else 1
        latents_NCHW = encode(pixels.reshape(-1, *pixels.shape[-3:])[..., :3])
        return latents_NCHW.unflatten(0, (clips, -1)).movedim(2, 1)

    def _fold_latents(self, decode, latents):
        if latents.ndim not in (4, 5) or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"The latent has the shape {list(latents.shape)}, but this VAE decodes [batch, {self.latent_channels}, "
                f"frames, height, width]. It is from another kind of model: use the VAE of that model.")
        if latents.ndim == 4:
            return decode(latents)
        return decode(latents.movedim(1, 2).flatten(0, 1)).unflatten(0, (len(latents), -1))


class VideoVAE(FoldedFrames, comfy.sd.VAE):
    """The Stable-Diffusion autoencoder of video latents.

    `state_dict` holds the weights without prefix, `ddconfig` and `embed_dim` come from the official YAML,
    `dtype` None leaves the choice to ComfyUI. `trained_size`: width and height in pixels of the pictures of the model
    that it came with, None if unknown.
    """

    def __init__(self, state_dict, ddconfig, embed_dim, dtype=None, trained_size=None):
        super().__init__(sd=state_dict, config={"params": {"ddconfig": dict(ddconfig), "embed_dim": embed_dim}},
                         dtype=dtype)
        self.latent_channels = embed_dim
        self.trained_size = trained_size
        self.downscale_ratio = self.upscale_ratio = 2 ** (len(ddconfig["ch_mult"]) - 1)


def small_vae(channels):
    """An untrained TAESD: 8x8 pixels to `channels` values, 2.4 million weights. Core's Load VAE reads a file of its
    state dict, with 4 or 16 channels. Its methods encode and decode images [N, 3, H, W] in -1..1."""
    net = comfy.taesd.taesd.TAESD(latent_channels=channels)
    # Core's layers leave their weights uninitialised. PyTorch's usual weights would more than halve the signal in each
    # of the ten layers without a skip: latents of a spread of 0.03, from which hundreds of steps learn no more than a
    # mean colour. He's keep it (arXiv 1502.01852), with residual blocks that begin as the identity (arXiv 1901.09321).
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)
    for layer in net.modules():
        if isinstance(layer, comfy.taesd.taesd.Block):
            torch.nn.init.zeros_(layer.conv[-1].weight)
    with torch.no_grad():  # the first pictures are nearly grey
        net.taesd_decoder[-1].weight.mul_(0.1)
        net.taesd_decoder[-1].bias.fill_(0.5)
    for fixed in (net.vae_scale, net.vae_shift):
        fixed.requires_grad_(False)
    return net


def demo_vae(path: Path) -> VideoVAE:
    """The VAE of a demo's DynamiCrafter file, which other demo models share."""
    found = read_checkpoint(path)
    params = json.loads(found.metadata["stillmotion.config"])["model"]["params"]["first_stage_config"]["params"]
    return VideoVAE(take_prefix(found.tensors, "first_stage_model."), params["ddconfig"], params["embed_dim"])


def pixel_vae():
    """For pixel-space models: core's conversion between 0..1 and -1..1, on clips [B, 3, T, H, W]."""
    return fold_frames(comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}))


def fold_frames(vae):
    """The same VAE for clips; one that already takes frames (a video VAE, or folded) is returned unchanged."""
    if vae.latent_dim == 3 or isinstance(vae, FoldedFrames):
        return vae
    folded = copy.copy(vae)
    folded.__class__ = type("FoldedVAE", (FoldedFrames, type(vae)), {})
    return folded


def _in_chunks(work, frames, pixels_per_frame):
    """Apply `work` to a few frames at a time, reporting progress and checking for an interrupt in between."""
    chunks = frames.split(max(1, PIXELS_PER_TICK // pixels_per_frame))
    if len(chunks) == 1:  # no bar: it would only jump to its end, on the node that shows another one
        return work(frames)
    progress = comfy.utils.ProgressBar(len(frames))
    done = []
    for chunk in chunks:
        comfy.model_management.throw_exception_if_processing_interrupted()  # since 0.12 the progress bar skips updates
        done.append(work(chunk))
        progress.update(len(chunk))
    return torch.cat(done)


def _spatial(kwargs):
    """Tiles in space only: each frame is processed separately, so there are no tiles in time."""
    return {key: value for key, value in kwargs.items() if key not in ("tile_t", "overlap_t")}
