"""The causal Wan 2.1 transformer: the network of Self-Forcing and LongLive, T2V and I2V, in native Wan keys.

Papers: Wan 2.1 (arXiv 2503.20314), Self-Forcing (arXiv 2506.08009), LongLive (arXiv 2509.22622). Tensor names end in
their layout: B videos, C channels, F latent frames, H, W latent height and width, L tokens, N context tokens.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import ContextKeys, Head, ImageEmbedding, Reach, Step, WanBlock, reaches
from .cache import CacheLayout, KVCache, Window
from .rope import make_rotation
from .schedule import precise_dtype

PATCH = (1, 2, 2)  # latent frames, rows and columns per token in all Wan 2.1 models


@dataclass(frozen=True, kw_only=True)
class WanParams:
    """Sizes of the network."""

    in_dim: int              # input channels: latent, plus mask and image latent in I2V models
    out_dim: int             # channels of the latent
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    text_dim: int
    freq_dim: int            # number of sinusoidal features of a timestep
    i2v: bool                # cross-attention includes image tokens
    clip_dim: int            # width of the vision tower's tokens, 0 without i2v

    def __post_init__(self):
        if self.dim % (2 * self.num_heads):
            raise ValueError(f"num_heads is {self.num_heads}, which does not divide the width {self.dim} into heads of "
                             "an even width. Set the number of heads in the file's header.")

    def cache_layout(self, *, capacity: int, sink: int, height: int, width: int, relative_sink: bool) -> CacheLayout:
        """Cache layout for a latent of height x width and `capacity` frames, including the `sink` frames."""
        return CacheLayout(
            layers=self.num_layers, width=self.dim, heads=self.num_heads, capacity=capacity, sink=sink,
            frame_tokens=(height // PATCH[1]) * (width // PATCH[2]), relative_sink=relative_sink)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoidal features [..., width] in float64: cosines, then sines, periods 2 pi to 20000 pi."""
    half, precise = width // 2, precise_dtype(t.device)
    frequencies = 10000.0 ** (-torch.arange(half, dtype=precise, device=t.device) / half)
    angles = t.to(precise)[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class CausalWan(nn.Module):
    """Predicts the flow (noise - clean) of a block of latent frames, each frame with its own timestep.

    `operations` gives the layer classes (`torch.nn` or one of `comfy.ops`), `attention` the attention function.
    """

    def __init__(self, params: WanParams, operations, attention, dtype=None, device=None):
        super().__init__()
        self.params = params
        self.dtype = dtype
        factory = {"dtype": dtype, "device": device}
        dim = params.dim
        self.patch_embedding = operations.Conv3d(params.in_dim, dim, PATCH, stride=PATCH, **factory)
        self.text_embedding = nn.Sequential(operations.Linear(params.text_dim, dim, **factory),
                                            nn.GELU(approximate="tanh"), operations.Linear(dim, dim, **factory))
        self.time_embedding = nn.Sequential(operations.Linear(params.freq_dim, dim, **factory), nn.SiLU(),
                                            operations.Linear(dim, dim, **factory))
        self.time_projection = nn.Sequential(nn.SiLU(), operations.Linear(dim, dim * 6, **factory))
        self.blocks = nn.ModuleList(
            WanBlock(dim, params.ffn_dim, params.num_heads, params.i2v, operations, attention, **factory)
            for _ in range(params.num_layers))
        patch_rows, patch_columns = PATCH[1:]
        self.head = Head(dim, params.out_dim * patch_rows * patch_columns, operations, **factory)
        if params.i2v:
            self.img_emb = ImageEmbedding(params.clip_dim, dim, operations, **factory)

    def project_context(self, text_BND: Tensor, image_BNW: Tensor | None = None) -> tuple[ContextKeys, ...]:
        """Keys and values of every cross-attention layer for text [B, N, text_dim] and, in I2V models, vision-tower
        tokens [B, N, clip_dim] (CLIP ViT-H: 257 x 1280). They depend on nothing else: compute them once per prompt."""
        params = self.params
        if text_BND.shape[-1] != params.text_dim:
            raise ValueError(f"The text embedding is {text_BND.shape[-1]} wide, but the model takes {params.text_dim}. "
                             "Use the text encoder of this model (UMT5-XXL for Wan 2.1).")
        image_BNC = None
        if params.i2v:
            if image_BNW is None:
                raise ValueError("This image-to-video model needs the tokens of the start image (clip_fea). Connect a "
                                 "CLIP vision output.")
            if image_BNW.ndim != 3 or image_BNW.shape[-1] != params.clip_dim:
                raise ValueError(f"clip_fea has shape {list(image_BNW.shape)}, but the model takes [batch, tokens, "
                                 f"{params.clip_dim}]. Use the CLIP vision tower of this model.")
            image_BNC = self.img_emb(image_BNW)
        text_BNC = self.text_embedding(text_BND)
        return tuple(block.cross_attn.project(text_BNC, image_BNC) for block in self.blocks)

    def forward(self, x_BCFHW: Tensor, t_BF: Tensor, context: tuple[ContextKeys, ...], frame_ids: Sequence[int],
                cache: KVCache | None = None, sink_mode: str = "write", mask_FF: Tensor | None = None,
                transformer_options: dict = {}) -> Tensor:
        """Flow [B, out_dim, F, H, W] for frames [B, in_dim, F, H, W] at timesteps t_BF in 0..1000.

        context: from `project_context`. frame_ids: absolute index of each latent frame. With a `cache` the frames
        must be consecutive; their keys are written to it according to `sink_mode` (see `cache.slots_of`) and they
        attend to everything it holds. Without one they attend to each other; mask_FF [F, F], if given, restricts this
        to entries that are True.
        """
        window, attends = self.open(x_BCFHW, frame_ids, cache, sink_mode), ()
        if cache is None and mask_FF is not None:
            attends = reaches(mask_FF, len(window.rotation_LP2) // len(frame_ids))
        return self.evaluate(x_BCFHW, t_BF, context, window, transformer_options, attends)

    def open(self, x_BCFHW: Tensor, frame_ids: Sequence[int], cache: KVCache | None, sink_mode: str) -> Window:
        """The window of a forward pass, for `evaluate`."""
        height, width = x_BCFHW.shape[3:]
        if height % PATCH[1] or width % PATCH[2]:
            raise ValueError(f"The latent is {width} x {height}. Width and height must be multiples of "
                             f"{PATCH[2]} and {PATCH[1]}. Choose another video size.")
        rows, columns, params = height // PATCH[1], width // PATCH[2], self.params
        if cache is None:
            return Window(make_rotation(frame_ids, rows, columns, params.dim // params.num_heads, x_BCFHW.device))
        return cache.open(frame_ids, sink_mode, rows, columns)

    def evaluate(self, x_BCFHW: Tensor, t_BF: Tensor, context: tuple[ContextKeys, ...], window: Window,
                 transformer_options: dict, attends: Sequence[Reach] = ()) -> Tensor:
        """`forward` after all that depends on the number of a frame has been prepared in `window`."""
        params = self.params
        time_BFC = self.time_embedding(timestep_embedding(t_BF, params.freq_dim).to(x_BCFHW.dtype))
        step = Step(self.time_projection(time_BFC).unflatten(-1, (6, -1)), window, attends, transformer_options)
        x_BCFRS = self.patch_embedding(x_BCFHW)
        # In one piece, as between the layers, so that a compiled first layer is the same graph as the others.
        x_BLC = x_BCFRS.flatten(2).transpose(1, 2).contiguous()
        replacements = transformer_options.get("patches_replace", {}).get("dit", {})
        for index, (block, keys) in enumerate(zip(self.blocks, context, strict=True)):
            own = keys, None if window.layers is None else window.layers[index]
            replace = replacements.get(("double_block", index))
            x_BLC = block(x_BLC, step, *own) if replace is None else replaced_block(replace, block, x_BLC, step, own)
        return self.unpatchify(self.head(x_BLC, time_BFC), *x_BCFRS.shape[2:])

    def unpatchify(self, x_BLP: Tensor, frames: int, rows: int, columns: int) -> Tensor:
        """Patches (row, column, channel innermost) [B, L, patch * out_dim] to [B, out_dim, F, H, W]."""
        batch, (patch_rows, patch_columns) = x_BLP.shape[0], PATCH[1:]
        x = x_BLP.reshape(batch, frames, rows, columns, patch_rows, patch_columns, self.params.out_dim)
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(
            batch, self.params.out_dim, frames, rows * patch_rows, columns * patch_columns)


def replaced_block(replace, block: WanBlock, x_BLC: Tensor, step: Step, own: tuple) -> Tensor:
    """Run a block through a replacement patch, called as in core's Wan model. `own`: the layer's keys and cache."""
    def original(args: dict) -> dict:
        return {"img": block(args["img"], step, *own)}

    given = {"img": x_BLC, "txt": own[0], "vec": step.modulation_BF6C, "pe": step.window.rotation_LP2,
             "transformer_options": step.transformer_options}
    return replace(given, {"original_block": original})["img"]
