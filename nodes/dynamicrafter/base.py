"""DynamiCrafter as one of ComfyUI's models: configuration, conditioning, memory and saving."""
from __future__ import annotations

from collections import UserDict

import comfy.conds
import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_management import cast_to_device
from comfy.patcher_extension import WrappersMP

from ..common import core_model
from ..common.core_model import (
    ClipLatent,
    HostNetwork,
    ModelConfig,
    build_model,
    call_wrapped,
    check_condition,
    check_width,
    inference_dtype,
)
from ..common.core_nodes import ClipModel, make_clip_patcher
from ..ddim.schedule import DiffusionParams, make_scale_arr
from .keys import file_key
from .unet import UNetParams, VideoUNet

TOWERS = "Use the {} of Load DynamiCrafter, or core's loader with OpenCLIP ViT-H for the published models."


class ManagedVideoUNet(HostNetwork, VideoUNet):
    """The network with ComfyUI's attention and the wrappers that other packs add."""

    channels_last = True

    def __init__(self, params: UNetParams, operations, dtype=None, device=None):
        super().__init__(params, operations, optimized_attention, dtype, device)

    def forward(self, x, timesteps, context, transformer_options={}, **conditions):
        return call_wrapped(super().forward, self, x, timesteps, context, transformer_options=transformer_options,
                            **conditions)


class DynamiCrafterConfig(ModelConfig):
    def __init__(self, unet: UNetParams, diffusion: DiffusionParams, scale_factor: float):
        self.sampling_settings = {"linear_start": diffusion.linear_start, "linear_end": diffusion.linear_end,
                                  "zsnr": diffusion.zero_snr}
        self.latent_format = lambda: ClipLatent(scale_factor)
        self.model_class = DynamiCrafterModel
        super().__init__(unet)
        self.diffusion = diffusion

    def model_type(self, state_dict, prefix=""):
        return core_model.prediction_type(self.diffusion.parameterization)

    def process_unet_state_dict_for_saving(self, state_dict):
        """Published layout: the image projector separate from the U-Net, and the buffer that identifies the variant."""
        saved = {file_key(key): value for key, value in state_dict.items()}
        if self.diffusion.base_scale is not None:
            saved["scale_arr"] = make_scale_arr(self.diffusion.base_scale).float()
        return saved


class DynamiCrafterModel(ClipModel):
    """`diffusion_params` holds what core's sigma table cannot: zero terminal SNR and dynamic rescale."""

    def __init__(self, model_config: DynamiCrafterConfig, model_type, device=None):
        super().__init__(model_config, model_type, device, ManagedVideoUNet)
        self.diffusion_params = model_config.diffusion
        self.params = model_config.unet_config["params"]

    def extra_conds(self, **kwargs):
        """Condition frames, vision tokens and frame stride, added to the conditioning by the Image to Video node.

        Raises ValueError for a conditioning without them and for condition frames of another size than the latent.
        """
        out = super().extra_conds(**kwargs)
        latent_BCTHW, tokens_BNW = kwargs.get("concat_latent_image"), kwargs.get("image_tokens")
        if latent_BCTHW is None or tokens_BNW is None:
            raise ValueError("A conditioning (positive or negative) has no start image. Pass both through "
                             "DynamiCrafter Image to Video before sampling.")
        check_width("vision tower", tokens_BNW, self.params.resampler.embedding_dim, TOWERS.format("CLIP_VISION"))
        check_width("text encoder", kwargs["cross_attn"], self.params.context_dim, TOWERS.format("CLIP"))
        check_condition(latent_BCTHW, kwargs["noise"], "DynamiCrafter Image to Video")
        fs = kwargs.get("frame_stride") or self.params.default_fs
        out["c_concat"] = comfy.conds.CONDNoiseShape(self.process_latent_in(latent_BCTHW))
        out["image_tokens"] = comfy.conds.CONDRegular(tokens_BNW)
        out["frame_stride"] = comfy.conds.CONDRegular(torch.tensor([fs]))
        return out


def keep_projected_context(executor, *args, **kwargs):
    """Wrapper around one whole sampler call, which opens a cache for `give_context_keys`.

    Hooks may change the weights from step to step, so with hooks nothing is cached.
    """
    guider = executor.class_obj
    if not any("hooks" in cond for conds in guider.conds.values() for cond in conds):
        # A UserDict, because core copies plain dicts before they reach the network.
        guider.model_options.setdefault("transformer_options", {})["context_cache"] = UserDict()
    return executor(*args, **kwargs)


def give_context_keys(executor, x_BCTHW, t_B, c_concat, c_crossattn, control, transformer_options, **conditions):
    """Wrapper around one call of the model: cross-attention keys are projected at the first step of a sampler call.
    They are made outside the network, so that all steps run the same graph when it is compiled."""
    cache, model = transformer_options.get("context_cache"), executor.class_obj
    if cache is not None:
        # A batch is identified by its conditions; core gives each a unique id. Windows may differ in length.
        frames = x_BCTHW.shape[2]
        slot = (tuple(transformer_options["uuids"]), c_crossattn.shape, frames)
        if slot not in cache:
            given = (cast_to_device(tensor, x_BCTHW.device, inference_dtype(model))
                     for tensor in (c_crossattn, conditions["image_tokens"]))
            cache[slot] = model.diffusion_model.project_context(*given, frames)
        transformer_options = {**transformer_options, "context_keys": cache[slot]}
    return executor(x_BCTHW, t_B, c_concat, c_crossattn, control, transformer_options, **conditions)


def make_model(unet: UNetParams, diffusion: DiffusionParams, scale_factor: float,
               weight_dtype: torch.dtype) -> DynamiCrafterModel:
    """The model without weights (on the meta device), to be loaded with `assign=True`."""
    return build_model(DynamiCrafterConfig(unet, diffusion, scale_factor), weight_dtype)


def make_patcher(model: DynamiCrafterModel) -> comfy.model_patcher.ModelPatcher:
    """MODEL around a loaded model."""
    patcher = make_clip_patcher(model)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "stillmotion_context", keep_projected_context)
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "stillmotion_context", give_context_keys)
    return patcher
