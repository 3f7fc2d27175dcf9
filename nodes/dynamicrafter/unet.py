"""The denoising network of DynamiCrafter (arXiv 2310.12190): a 2-D U-Net whose blocks also mix over time.

Tensor names end in their layout: B clips, T frames, N = B * T frames folded into the batch, C channels, H height,
W width, E embedding, L text tokens, Q image queries of a frame. The published key layout is kept, with the image
projector inside under its published prefix `image_proj_model.`.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..common.embedding import sinusoids
from ..common.fused import add_bias, add_group_norm, conv_apart, group_norm
from ..common.patches import channels_last, join_skip, open_options, patch_hidden
from .attention import ContextKeys, ImageTextAttention, SpatialTransformer, Step, TemporalTransformer
from .resampler import Resampler, ResamplerParams

INIT_ATTENTION_HEADS = 8  # fixed in the published model, whatever its width


@dataclass(frozen=True, kw_only=True)
class UNetParams:
    """Sizes of the network, named as in the official YAML (`unet_config`)."""

    in_channels: int
    out_channels: int
    model_channels: int
    attention_resolutions: tuple[int, ...]
    num_res_blocks: int
    channel_mult: tuple[int, ...]
    num_head_channels: int
    transformer_depth: int
    context_dim: int
    image_cross_attention_scale_learnable: bool
    default_fs: int
    resampler: ResamplerParams


def frame_tokens(tokens_BQC: Tensor, frames: int, per_frame: int) -> Tensor:
    """The image tokens of each frame: [B, video_length * per_frame, C] -> [B * frames, per_frame, C].

    The network has tokens for `video_length` frames. For another number they are interpolated along time, keeping the
    first and last frame, so that each frame has its own tokens.
    """
    tokens_BVQC = tokens_BQC.unflatten(1, (-1, per_frame))
    if tokens_BVQC.shape[1] != frames:
        flat_BCV = tokens_BVQC.flatten(2).transpose(1, 2)
        flat_BCT = F.interpolate(flat_BCV, size=frames, mode="linear", align_corners=True)
        tokens_BVQC = flat_BCT.transpose(1, 2).unflatten(-1, (per_frame, -1))
    return tokens_BVQC.flatten(0, 1)


def temporal_conv_class(conv3d: type[nn.Conv3d]) -> type[nn.Conv3d]:
    """A Conv3d with a (3, 1, 1) kernel, computed as a 2-D convolution over (T, H * W): the same numbers, several
    times faster on a CPU, and channels-last as the other convolutions. ComfyUI's class still casts and patches the
    weights."""

    class FlatConv3d(conv3d):
        # Since 0.12 core also passes a padding mode (autopad), which only its VAEs use.
        def _conv_forward(self, x_BCTHW: Tensor, weight: Tensor, bias: Tensor | None, *_args, **_kwargs) -> Tensor:
            size = x_BCTHW.shape[-2:]
            return F.conv2d(x_BCTHW.flatten(3), weight[..., 0], bias, padding=(1, 0)).unflatten(-1, size)

    return FlatConv3d


class TemporalConv(nn.Module):
    """Four residual convolutions along time (ModelScope, arXiv 2308.06571) of x + branch + bias."""

    def __init__(self, channels: int, operations, **factory):
        super().__init__()
        conv = temporal_conv_class(operations.Conv3d)

        def layer(*between: nn.Module) -> nn.Sequential:
            # The identity replaces the official dropout, which keeps the published keys.
            return nn.Sequential(operations.GroupNorm(32, channels, **factory), nn.SiLU(), *between,
                                 conv(channels, channels, (3, 1, 1), padding=(1, 0, 0), **factory))

        self.conv1 = layer()
        self.conv2 = layer(nn.Identity())
        self.conv3 = layer(nn.Identity())
        self.conv4 = layer(nn.Identity())

    def forward(self, x_BCTHW: Tensor, branch_BCTHW: Tensor, bias_C: Tensor | None) -> Tensor:
        x_BCTHW, normed_BCTHW = add_group_norm(x_BCTHW, branch_BCTHW, bias_C, self.conv1[0])
        h_BCTHW, bias_C = conv_apart(self.conv1[-1], normed_BCTHW)
        for layer in (self.conv2, self.conv3, self.conv4):
            h_BCTHW, bias_C = conv_apart(layer[-1], group_norm(h_BCTHW, layer[0], add=bias_C))
        return add_bias(x_BCTHW, h_BCTHW, bias_C)


class ResBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, emb_channels: int, operations, **factory):
        super().__init__()
        self.in_layers = nn.Sequential(operations.GroupNorm(32, channels, **factory), nn.SiLU(),
                                       operations.Conv2d(channels, out_channels, 3, padding=1, **factory))
        self.emb_layers = nn.Sequential(nn.SiLU(), operations.Linear(emb_channels, out_channels, **factory))
        self.out_layers = nn.Sequential(operations.GroupNorm(32, out_channels, **factory), nn.SiLU(), nn.Identity(),
                                        operations.Conv2d(out_channels, out_channels, 3, padding=1, **factory))
        self.skip_connection = (nn.Identity() if channels == out_channels
                                else operations.Conv2d(channels, out_channels, 1, **factory))
        self.temopral_conv = TemporalConv(out_channels, operations, **factory)  # spelt as in the published keys

    def forward(self, x_NCHW: Tensor, step: Step) -> Tensor:
        h, shift = conv_apart(self.in_layers[-1], group_norm(x_NCHW, self.in_layers[0]), self.emb_layers(step.emb_NE))
        h, bias_C = conv_apart(self.out_layers[-1], group_norm(h, self.out_layers[0], add=shift))
        if not isinstance(self.skip_connection, nn.Identity):
            x_NCHW, bias_C = conv_apart(self.skip_connection, x_NCHW, bias_C)
        x_BCTHW, h_BCTHW = (given.unflatten(0, (-1, step.frames)).transpose(1, 2) for given in (x_NCHW, h))
        return self.temopral_conv(x_BCTHW, h_BCTHW, bias_C).transpose(1, 2).flatten(0, 1)


class Downsample(nn.Module):
    def __init__(self, channels: int, operations, **factory):
        super().__init__()
        self.op = operations.Conv2d(channels, channels, 3, stride=2, padding=1, **factory)

    def forward(self, x_NCHW: Tensor, step: Step) -> Tensor:
        return self.op(x_NCHW)


class Upsample(nn.Module):
    def __init__(self, channels: int, operations, **factory):
        super().__init__()
        self.conv = operations.Conv2d(channels, channels, 3, padding=1, **factory)

    def forward(self, x_NCHW: Tensor, step: Step) -> Tensor:
        return self.conv(F.interpolate(x_NCHW, size=step.skip_size, mode="nearest"))


def run_block(layers: nn.ModuleList, h_NCHW: Tensor, step: Step) -> Tensor:
    for layer in layers:
        h_NCHW = layer(h_NCHW, step)
    return h_NCHW


class VideoUNet(nn.Module):
    """Predicts eps or v of a noisy latent clip; the condition frames are on further channels.

    `operations` gives the layer classes (`torch.nn` or one of `comfy.ops`), `attention` the attention function.
    """

    def __init__(self, params: UNetParams, operations, attention, dtype=None, device=None):
        super().__init__()
        self.params = params
        self.dtype = dtype
        self.stride = 2 ** (len(params.channel_mult) - 1)  # of the deepest level
        self.frame_attention = {self.stride, *params.attention_resolutions}  # strides of levels that have it
        factory = {"dtype": dtype, "device": device}
        layers = {"operations": operations, "attention": attention, **factory}
        width, emb = params.model_channels, params.model_channels * 4

        def embedding() -> nn.Sequential:
            return nn.Sequential(operations.Linear(width, emb, **factory), nn.SiLU(),
                                 operations.Linear(emb, emb, **factory))

        def res(channels: int, out_channels: int) -> ResBlock:
            return ResBlock(channels, out_channels, emb, operations, **factory)

        def transformers(channels: int) -> list[nn.Module]:
            shape = (channels, channels // params.num_head_channels, params.num_head_channels, params.transformer_depth)
            return [SpatialTransformer(*shape, params.context_dim, params.image_cross_attention_scale_learnable,
                                       **layers),
                    TemporalTransformer(*shape, conv_projection=False, **layers)]

        self.time_embed = embedding()
        self.fps_embedding = embedding()
        self.image_proj_model = Resampler(params.resampler, **layers)
        self.init_attn = nn.ModuleList([TemporalTransformer(
            width, INIT_ATTENTION_HEADS, params.num_head_channels, params.transformer_depth, conv_projection=True,
            **layers)])

        self.input_blocks = nn.ModuleList(
            [nn.ModuleList([operations.Conv2d(params.in_channels, width, 3, padding=1, **factory)])])
        channels, skips, scale = width, [width], 1
        for level, mult in enumerate(params.channel_mult):
            for _ in range(params.num_res_blocks):
                block = [res(channels, mult * width)]
                channels = mult * width
                if scale in params.attention_resolutions:
                    block += transformers(channels)
                self.input_blocks.append(nn.ModuleList(block))
                skips.append(channels)
            if level < len(params.channel_mult) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(channels, operations, **factory)]))
                skips.append(channels)
                scale *= 2

        self.middle_block = nn.ModuleList([res(channels, channels), *transformers(channels), res(channels, channels)])

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(params.channel_mult))):
            for i in range(params.num_res_blocks + 1):
                block = [res(channels + skips.pop(), mult * width)]
                channels = mult * width
                if scale in params.attention_resolutions:
                    block += transformers(channels)
                if level and i == params.num_res_blocks:
                    block.append(Upsample(channels, operations, **factory))
                    scale //= 2
                self.output_blocks.append(nn.ModuleList(block))

        for number, layer in enumerate(self.context_layers):
            layer.number = number
        self.out = nn.Sequential(operations.GroupNorm(32, channels, **factory), nn.SiLU(),
                                 operations.Conv2d(channels, params.out_channels, 3, padding=1, **factory))

    @property
    def context_layers(self) -> list[ImageTextAttention]:
        return [layer for layer in self.modules() if isinstance(layer, ImageTextAttention)]

    def project_context(self, text_BLC: Tensor, image_BNW: Tensor, frames: int) -> tuple[ContextKeys, ...]:
        """Keys and values of every cross-attention layer for text [B, L, C] and vision tokens [B, N, W].

        They depend on neither the noisy clip nor the timestep, so a sampler computes them once per run.
        """
        tokens_BQC = self.image_proj_model(image_BNW)
        image_NQC = frame_tokens(tokens_BQC, frames, self.params.resampler.num_queries)
        return tuple(layer.project(text_BLC, image_NQC) for layer in self.context_layers)

    def forward(self, x_BCTHW: Tensor, timesteps: Tensor, context: Tensor | None, image_tokens: Tensor,
                frame_stride: Tensor, control=None, transformer_options: dict = {}) -> Tensor:
        """Prediction [B, out_channels, T, H, W] for clips [B, in_channels, T, H, W] (condition channels last).

        timesteps [B] in 0..999, context [B, L, C] text, image_tokens [B, N, W] of the vision tower, frame_stride [B].
        `transformer_options["context_keys"]` may hold the result of `project_context`.
        """
        batch, _, frames, height, width = x_BCTHW.shape
        keys = transformer_options.get("context_keys")
        if keys is None:
            keys = self.project_context(context, image_tokens, frames)

        dtype = x_BCTHW.dtype
        emb_BE = (self.time_embed(sinusoids(timesteps, self.params.model_channels).to(dtype))
                  + self.fps_embedding(sinusoids(frame_stride, self.params.model_channels).to(dtype)))
        # Sizes that are not a multiple of the deepest stride are edge-padded and cropped at the end.
        h = x_BCTHW.transpose(1, 2).flatten(0, 1)
        if height % self.stride or width % self.stride:
            h = F.pad(h, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")
        h = channels_last(h)
        options = open_options(transformer_options, h)
        step = Step(frames, emb_BE.repeat_interleave(frames, dim=0), context, keys, options)
        skips = []
        for number, block in enumerate(self.input_blocks):
            options["block"] = ("input", number)
            if number == 0:
                h = self.init_attn[0](block[0](h), step)
            else:
                h = run_block(block, h, step)
            h = patch_hidden("input_block_patch", h, options)
            skips.append(h)
            h = patch_hidden("input_block_patch_after_skip", h, options)
        options["block"] = ("middle", 0)
        h = run_block(self.middle_block, h, step)
        for number, block in enumerate(self.output_blocks):
            options["block"] = ("output", number)
            h = join_skip(h, skips.pop(), options)
            if skips:
                step.skip_size = skips[-1].shape[-2:]
            h = run_block(block, h, step)
        out_NCHW = self.out[-1](group_norm(h, self.out[0]))[:, :, :height, :width]
        return out_NCHW.unflatten(0, (batch, frames)).transpose(1, 2)
