"""The video U-Net: a small network that denoises clips from a text, from given frames, or from both.

Convolutions are factorised into space and time (Pseudo-3D, arXiv 2209.14792). Each residual block is followed by
attention within the frame (at selected levels), to the text and along time. Given frames are on further input channels,
with a mask that marks them, so one network makes clips from a text alone, continues an image, predicts the future of a
clip or fills in between its ends.

Tensor names end in their layout: B clips, T frames, N = B * T frames folded into the batch, C channels, H height,
W width, L text tokens, E embedding, D additional condition.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.attention import torch_attention
from ..common.embedding import sinusoids
from ..common.fused import add_bias, add_group_norm, conv_apart, group_norm
from ..common.patches import channels_last, join_skip, open_options, patch_hidden
from .attention import Attention, SpatialAttention, Step, TemporalAttention, TextAttention

GROUPS = 16  # of every group norm; channel numbers are multiples of it


@dataclass(frozen=True, kw_only=True)
class VideoUNetParams:
    """Sizes of the network."""

    channels: int                       # C of a clip: 3 for pixels, 4 for Stable Diffusion's latents
    model_channels: int                 # of the first level
    channel_mult: tuple[int, ...]       # channels of each level in model_channels; each level halves height and width
    num_res_blocks: int                 # per level
    spatial_attention: tuple[int, ...]  # levels, 0 the finest, that attend within the frame
    head_channels: int
    context_dim: int                    # width of the text tokens
    additional_condition_dim: int       # of a vector given in addition to the text; 0: none

    def __post_init__(self):
        if self.model_channels % GROUPS or self.model_channels % self.head_channels:
            raise ValueError(f"model_channels is {self.model_channels}. It must be a multiple of {GROUPS} and of "
                             f"head_channels ({self.head_channels}).")
        unknown = set(self.spatial_attention) - set(range(len(self.channel_mult)))
        if unknown:
            raise ValueError(f"spatial_attention has the levels {sorted(unknown)}, but channel_mult "
                             f"{list(self.channel_mult)} has only the levels 0 to {len(self.channel_mult) - 1}.")

    @property
    def in_channels(self) -> int:
        """Noisy clip, given frames, mask."""
        return 2 * self.channels + 1


class ResBlock(nn.Module):
    """Two spatial convolutions, the second modulated by the timestep (scale and shift), then one along time."""

    def __init__(self, channels: int, out_channels: int, emb_channels: int, operations, **factory):
        super().__init__()
        self.norm1 = operations.GroupNorm(GROUPS, channels, **factory)
        self.conv1 = operations.Conv2d(channels, out_channels, 3, padding=1, **factory)
        self.emb = operations.Linear(emb_channels, 2 * out_channels, **factory)
        self.norm2 = operations.GroupNorm(GROUPS, out_channels, **factory)
        self.conv2 = operations.Conv2d(out_channels, out_channels, 3, padding=1, **factory)
        self.norm3 = operations.GroupNorm(GROUPS, out_channels, **factory)
        # Over (T, H * W): a convolution along time with the kernels that are fastest on CPUs.
        self.temporal_conv = operations.Conv2d(out_channels, out_channels, (3, 1), padding=(1, 0), **factory)
        self.skip = (nn.Identity() if channels == out_channels
                     else operations.Conv2d(channels, out_channels, 1, **factory))

    def forward(self, x_NCHW: Tensor, step: Step) -> Tensor:
        scale, shift = self.emb(F.silu(step.emb_NE))[:, :, None, None].chunk(2, dim=1)
        h, bias_C = conv_apart(self.conv1, group_norm(x_NCHW, self.norm1))
        h = F.silu(torch.addcmul(shift, group_norm(h, self.norm2, silu=False, add=bias_C), 1 + scale))
        h, bias_C = conv_apart(self.conv2, h)
        if not isinstance(self.skip, nn.Identity):
            x_NCHW, bias_C = conv_apart(self.skip, x_NCHW, bias_C)
        size = h.shape[-2:]
        x_BCTP, h_BCTP = (given.unflatten(0, (-1, step.frames)).transpose(1, 2).flatten(3) for given in (x_NCHW, h))
        x_BCTP, normed_BCTP = add_group_norm(x_BCTP, h_BCTP, bias_C, self.norm3)
        x_BCTP = add_bias(x_BCTP, *conv_apart(self.temporal_conv, normed_BCTP))
        return x_BCTP.unflatten(3, size).transpose(1, 2).flatten(0, 1)


class Block(nn.Module):
    """One residual block and the attentions that follow it."""

    def __init__(self, channels: int, out_channels: int, params: VideoUNetParams, spatial: bool, operations,
                 attention, **factory):
        super().__init__()
        shape = (out_channels, params.head_channels, operations, attention)
        self.res = ResBlock(channels, out_channels, params.model_channels * 4, operations, **factory)
        self.spatial = SpatialAttention(*shape, **factory) if spatial else None
        self.text = TextAttention(*shape, context_dim=params.context_dim, **factory)
        self.temporal = TemporalAttention(*shape, **factory)

    def forward(self, x_NCHW: Tensor, step: Step) -> Tensor:
        h = self.res(x_NCHW, step)
        step.transformer_options["activations_shape"] = list(h.shape)
        if self.spatial is not None:
            h = self.spatial(h, step)
        h = self.text(h, step)
        step.transformer_options["transformer_index"] += 1
        return self.temporal(h, step)


class VideoUNet(nn.Module):
    """Predicts eps or v of a noisy clip.

    `operations` gives the layer classes (`torch.nn` or one of `comfy.ops`), `attention` the attention function. For
    other kinds of conditions override `embed`, which handles all conditions except text and frames.
    """

    def __init__(self, params: VideoUNetParams, operations, attention, dtype=None, device=None):
        super().__init__()
        self.params = params
        self.dtype = dtype
        self.stride = 2 ** (len(params.channel_mult) - 1)  # of the deepest level
        self.frame_attention = {2 ** level for level in params.spatial_attention}  # strides of levels that have it
        factory = {"dtype": dtype, "device": device}
        width, emb = params.model_channels, params.model_channels * 4

        def block(channels: int, out_channels: int, level: int) -> Block:
            return Block(channels, out_channels, params, level in params.spatial_attention, operations, attention,
                         **factory)

        def conv(channels: int, out_channels: int, stride: int = 1) -> nn.Module:
            return operations.Conv2d(channels, out_channels, 3, stride=stride, padding=1, **factory)

        self.time_embed = nn.Sequential(operations.Linear(width, emb, **factory), nn.SiLU(),
                                        operations.Linear(emb, emb, **factory))
        if params.additional_condition_dim:
            self.additional_embed = operations.Linear(params.additional_condition_dim, emb, **factory)
        self.input = conv(params.in_channels, width)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        widths = [mult * width for mult in params.channel_mult]
        channels, skips = width, []
        for level, out_channels in enumerate(widths):
            stage = nn.ModuleDict({"blocks": nn.ModuleList()})
            for _ in range(params.num_res_blocks):
                stage["blocks"].append(block(channels, out_channels, level))
                channels = out_channels
                skips.append(channels)
            if level < len(widths) - 1:
                stage["resample"] = conv(channels, channels, stride=2)
            self.down.append(stage)
        deepest = len(widths) - 1
        self.middle = nn.ModuleList([block(channels, channels, deepest) for _ in range(2)])
        for level, out_channels in reversed(list(enumerate(widths))):
            stage = nn.ModuleDict({"blocks": nn.ModuleList()})
            for _ in range(params.num_res_blocks):
                stage["blocks"].append(block(channels + skips.pop(), out_channels, level))
                channels = out_channels
            if level:
                channels = widths[level - 1]
                stage["resample"] = conv(out_channels, channels)
            self.up.append(stage)
        self.norm = operations.GroupNorm(GROUPS, channels, **factory)
        self.output = conv(channels, params.channels)

    def _input_layers(self) -> Iterator[nn.Module]:
        yield self.input
        for stage in self.down:
            yield from stage["blocks"]
            if "resample" in stage:
                yield stage["resample"]

    def embed(self, t_B: Tensor, additional_BD: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Embedding [B, E] that modulates each residual block: the timestep, and the additional condition if given."""
        emb_BE = self.time_embed(sinusoids(t_B, self.params.model_channels).to(dtype))
        if additional_BD is None:
            return emb_BE
        if additional_BD.shape[-1] != self.params.additional_condition_dim:
            raise ValueError(f"The additional condition is {additional_BD.shape[-1]} wide, but this network takes "
                             f"{self.params.additional_condition_dim or 'none'}. Train one with "
                             f"additional_condition_dim {additional_BD.shape[-1]}, or leave the condition out.")
        return emb_BE + self.additional_embed(additional_BD.to(dtype))

    def forward(self, x_BCTHW: Tensor, t_B: Tensor, text_BLC: Tensor, additional_BD: Tensor | None = None,
                transformer_options: dict = {}) -> Tensor:
        """Prediction [B, C, T, H, W] for clips [B, 2 C + 1, T, H, W]: the noisy clip, the given frames (zero where
        none is given), the mask (1: given). t_B: timesteps 0..999; text_BLC: text tokens."""
        frames, height, width = x_BCTHW.shape[2:]
        emb_BE = self.embed(t_B, additional_BD, x_BCTHW.dtype)
        # Sizes that are not a multiple of the deepest stride are edge-padded and cropped at the end.
        h = x_BCTHW.transpose(1, 2).flatten(0, 1)
        if height % self.stride or width % self.stride:
            h = F.pad(h, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")
        h = channels_last(h)
        size, options = h.shape[-2:], open_options(transformer_options, h)
        step, skips = Step(frames, emb_BE.repeat_interleave(frames, dim=0), text_BLC, options), []
        # Blocks are numbered as in core's U-Net: the first convolution and each downsampling are input blocks too.
        for number, layer in enumerate(self._input_layers()):
            options["block"] = ("input", number)
            h = layer(h, step) if isinstance(layer, Block) else layer(h)
            h = patch_hidden("input_block_patch", h, options)
            if isinstance(layer, Block):
                skips.append(h)
            h = patch_hidden("input_block_patch_after_skip", h, options)
        options["block"] = ("middle", 0)
        for index, block in enumerate(self.middle):
            options["block_index"] = index
            h = block(h, step)
        options["block_index"], numbers = 0, itertools.count()
        for stage in self.up:
            for block in stage["blocks"]:
                options["block"] = ("output", next(numbers))
                h = block(join_skip(h, skips.pop(), options), step)
            if "resample" in stage:
                h = stage["resample"](F.interpolate(h, size=skips[-1].shape[-2:], mode="nearest"))
        if h.shape[-2:] != size:  # a patch has downscaled the first skip itself
            h = F.interpolate(h, size=size, mode="nearest")
        out_NCHW = self.output(group_norm(h, self.norm))[:, :, :height, :width]
        return out_NCHW.unflatten(0, (-1, frames)).transpose(1, 2)


def new_network(params: VideoUNetParams, seed: int, kind: type[VideoUNet] = VideoUNet) -> VideoUNet:
    """An untrained network of class `kind` on the CPU: the last layer of each branch is zero, so that each branch
    starts as the identity and the network predicts zero."""
    torch.manual_seed(seed)
    net = kind(params, nn, torch_attention)
    for module in net.modules():
        last = {ResBlock: "temporal_conv", kind: "output"}.get(type(module))
        if isinstance(module, Attention):
            last = "to_out"
        if last:
            nn.init.zeros_(getattr(module, last).weight)
            nn.init.zeros_(getattr(module, last).bias)
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    return net
