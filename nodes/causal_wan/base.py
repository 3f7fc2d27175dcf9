"""Causal Wan as a ComfyUI model: configuration, conditioning and memory estimates."""
from __future__ import annotations

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import torch
from comfy.ldm.modules.attention import optimized_attention

from ..common.core_model import ClipLatent, HostNetwork, ModelConfig, build_model, call_wrapped, check_width, size_words
from ..common.quantized import Quantized
from .model import CausalWan, WanParams

TOWERS = "Connect the {} of this model: UMT5-XXL and CLIP ViT-H of Wan 2.1 for published models."
MASK_CHANNELS = 4  # one per video frame in a latent frame of Wan's VAE


class ManagedCausalWan(HostNetwork, CausalWan):
    """The network with ComfyUI's attention and interface, called through the wrappers added by other packs."""

    def __init__(self, params: WanParams, operations, dtype=None, device=None):
        super().__init__(params, operations, optimized_attention, dtype, device)

    def forward(self, x, timestep, context, clip_fea=None, transformer_options={}, **block):
        """Flow [B, out_dim, F, H, W] of frames x [B, in_dim, F, H, W] at `timestep` [B], or per frame [B, F].

        `context` is text tokens [B, N, text_dim], with `clip_fea` for image to video, or the result of
        `project_context`. `block`: frame_ids, cache, sink_mode, mask_FF of `CausalWan.forward`, or `window` of
        `evaluate`; without them, as with core's own samplers, all frames attend to each other.
        """
        return call_wrapped(self._forward, self, x, timestep, context, clip_fea,
                            transformer_options=transformer_options, **block)

    def _forward(self, x, timestep, context, clip_fea, transformer_options, frame_ids=None, cache=None,
                 sink_mode="write", mask_FF=None, window=None, **_):
        frames = x.shape[2]
        t_BF = timestep if timestep.ndim == 2 else timestep[:, None].expand(-1, frames)
        if isinstance(context, torch.Tensor):
            context = self.project_context(context, clip_fea)
        if window is not None:
            return self.evaluate(x, t_BF, context, window, transformer_options)
        return super().forward(x, t_BF, context, range(frames) if frame_ids is None else frame_ids, cache, sink_mode,
                               mask_FF, transformer_options)


class CausalWanConfig(ModelConfig):
    sampling_settings = {"shift": 5.0}  # of Self-Forcing and LongLive, for core's schedulers; our sampler has its own

    def __init__(self, params: WanParams, scale_factor: float):
        # Wan's 16 channels each have a mean and standard deviation, the 4 channels of small models share one factor
        self.latent_format = comfy.latent_formats.Wan21 if params.out_dim == 16 else lambda: ClipLatent(scale_factor)
        self.model_class = CausalWanModel
        super().__init__(params)
        self.memory_usage_factor = params.dim / 2222  # same formula as core's for Wan

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.FLOW


def wan_params(patcher) -> WanParams:
    """Network sizes of a MODEL; raises ValueError unless it is a causal Wan."""
    if not isinstance(patcher.model, CausalWanModel):
        raise ValueError(f"The model is {type(patcher.model).__name__}, not a causal Wan. Use Load Causal Wan; for "
                         "other models use KSampler.")
    return patcher.model.wan_params


class CausalWanModel(comfy.model_base.BaseModel):
    """`wan_params` holds the network's sizes and whether it takes an image, `encoders_of` the name of the demo whose
    encoders it was trained with, if any."""

    encoders_of: str | None = None

    def __init__(self, model_config: CausalWanConfig, model_type, device=None):
        super().__init__(model_config, model_type, device, ManagedCausalWan)
        self.wan_params: WanParams = model_config.unet_config["params"]

    def extra_conds(self, **kwargs):
        """Text tokens; for image to video also y (mask, then image latent, over all latent frames) and image tokens.

        Entries of the conditioning, as in core's Wan nodes: "concat_latent_image" [B, C, T, h, w],
        "concat_mask" [B, 1 or 4, T, h, w] with 0 where a frame is given, "clip_vision_output". Raises ValueError
        if one is missing for an image-to-video model, or if their size differs from the latent's.
        """
        out = super().extra_conds(**kwargs)
        text_BLC = kwargs["cross_attn"]
        check_width("text encoder", text_BLC, self.wan_params.text_dim, TOWERS.format("CLIP"))
        out["c_crossattn"] = comfy.conds.CONDRegular(text_BLC)
        if self.wan_params.i2v:
            tower = kwargs.get("clip_vision_output")
            if tower is None:
                raise ValueError("This image-to-video model needs image tokens (clip_fea), but the conditioning has "
                                 "none. Connect clip_vision (or clip_vision_output) of Causal Wan Image "
                                 "to Video, and pass positive and negative through it.")
            tokens_BNC = tower.penultimate_hidden_states
            check_width("vision tower", tokens_BNC, self.wan_params.clip_dim, TOWERS.format("CLIP_VISION"))
            out["clip_fea"] = comfy.conds.CONDRegular(tokens_BNC)
            y_BYTHW = self._image_condition(kwargs["noise"], kwargs.get("concat_latent_image"),
                                            kwargs.get("concat_mask"))
            out["c_concat"] = comfy.conds.CONDNoiseShape(y_BYTHW)
        return out

    def extra_conds_shapes(self, **kwargs):
        """The entry "block_memory" that our sampler adds to the conditioning: bytes of the caches, latent frames in the
        longest forward pass, bytes to decode a block."""
        return {"block_memory": kwargs["block_memory"]} if "block_memory" in kwargs else {}

    def memory_required(self, input_shape, cond_shapes={}):
        """Bytes for core's memory management: a forward pass over part of the video, plus the caches."""
        if "block_memory" not in cond_shapes:
            return super().memory_required(input_shape, cond_shapes)
        nbytes, frames, decoding = cond_shapes["block_memory"][0]
        return max(decoding, super().memory_required([*input_shape[:2], frames, *input_shape[3:]])) + nbytes

    def _image_condition(self, noise_BCTHW, latent_BCTHW, mask_BMTHW):
        """y [B, 4 + C, T, h, w]: mask, 1 where a frame is given, then the latent of the frames."""
        if latent_BCTHW is None or mask_BMTHW is None:
            raise ValueError("This image-to-video model needs a masked image latent (y), but the conditioning has "
                             "none. Pass positive and negative through Causal Wan Image to Video.")
        for part_BXTHW in (latent_BCTHW, mask_BMTHW):
            if part_BXTHW.shape[2:] != noise_BCTHW.shape[2:]:
                raise ValueError(f"The latent is {size_words(noise_BCTHW.shape[2:])}, but the conditioning (y) was "
                                 f"made for {size_words(part_BXTHW.shape[2:])} (frames, height, width). Use the latent "
                                 "from Causal Wan Image to Video, or set the same size and length there.")
        if latent_BCTHW.shape[1] != self.wan_params.out_dim:
            raise ValueError(f"The conditioning's image latent has {latent_BCTHW.shape[1]} channels, but this model "
                             f"takes {self.wan_params.out_dim}. Use the VAE of this model.")
        given_BMTHW = 1 - mask_BMTHW.to(latent_BCTHW)
        given_BMTHW = given_BMTHW.expand(len(latent_BCTHW), -1, -1, -1, -1)
        if given_BMTHW.shape[1] == 1:
            given_BMTHW = given_BMTHW.expand(-1, MASK_CHANNELS, -1, -1, -1)
        return torch.cat((given_BMTHW, self.process_latent_in(latent_BCTHW)), dim=1)


def make_model(params: WanParams, scale_factor: float, weight_dtype: torch.dtype,
               quantized: Quantized | None = None) -> CausalWanModel:
    """The model without weights (on the meta device), to be loaded with `assign=True`.

    `scale_factor` is for 4-channel latents. `quantized`: the layers stored in 8 or 4 bits.
    """
    return build_model(CausalWanConfig(params, scale_factor), weight_dtype, quantized=quantized)
