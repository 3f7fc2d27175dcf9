"""DynamiCrafter as one of ComfyUI's models: configuration, conditioning, memory and saving."""
from __future__ import annotations

from collections import UserDict

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

from ..diffusion.schedule import DiffusionParams, make_scale_arr
from .unet import UNetParams, VideoUNet

IMAGE_PROJECTOR = "image_proj_model."


class VideoLatent(comfy.latent_formats.SD15):
    """Stable Diffusion's latents with a time axis: [B, 4, T, H / 8, W / 8]."""

    latent_dimensions = 3

    def __init__(self, scale_factor: float):
        super().__init__(scale_factor)
        self.taesd_decoder_name = None  # core's TAESD preview takes single images only


class ManagedVideoUNet(VideoUNet):
    """The network with the host's attention, open to the wrappers that other packs put around a network."""

    def __init__(self, params: UNetParams, operations, dtype=None, device=None):
        super().__init__(params, operations, optimized_attention, dtype, device)

    def forward(self, x, timesteps, context, transformer_options={}, **conditions):
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        executor = WrapperExecutor.new_class_executor(super().forward, self, wrappers)
        return executor.execute(x, timesteps, context, transformer_options=transformer_options, **conditions)


class DynamiCrafterConfig(comfy.supported_models_base.BASE):
    """Core's description of a model. Our own sizes stay in one opaque entry, since core reads known names in it."""

    unet_extra_config = {}
    memory_usage_factor = 1.2

    def __init__(self, unet: UNetParams, diffusion: DiffusionParams, scale_factor: float):
        self.sampling_settings = {"linear_start": diffusion.linear_start, "linear_end": diffusion.linear_end,
                                  "zsnr": diffusion.zero_snr}
        self.latent_format = lambda: VideoLatent(scale_factor)
        super().__init__({"params": unet})
        self.diffusion = diffusion

    def model_type(self, state_dict, prefix=""):
        kinds = comfy.model_base.ModelType
        return kinds.V_PREDICTION if self.diffusion.parameterization == "v" else kinds.EPS

    def get_model(self, state_dict, prefix="", device=None):
        return DynamiCrafterModel(self, self.model_type(state_dict, prefix), device)

    def process_unet_state_dict_for_saving(self, state_dict):
        """Published layout: the image projector beside the U-Net, and the buffer by which variants are told apart."""
        saved = {key if key.startswith(IMAGE_PROJECTOR) else f"model.diffusion_model.{key}": value
                 for key, value in state_dict.items()}
        if self.diffusion.base_scale is not None:
            saved["scale_arr"] = make_scale_arr(self.diffusion.base_scale).float()
        return saved


class DynamiCrafterModel(comfy.model_base.BaseModel):
    """`diffusion_params` tells samplers what the sigma table of core cannot: zero terminal SNR, dynamic rescale."""

    def __init__(self, model_config: DynamiCrafterConfig, model_type, device=None):
        super().__init__(model_config, model_type, device, ManagedVideoUNet)
        self.diffusion_params = model_config.diffusion
        self.params = model_config.unet_config["params"]

    def extra_conds(self, **kwargs):
        """Condition frames, vision tokens and frame stride, put into the conditioning by the Image to Video node.

        Raises ValueError for a conditioning without them and for condition frames of another size than the latent.
        """
        out = super().extra_conds(**kwargs)
        latent_BCTHW, tokens_BNW = kwargs.get("concat_latent_image"), kwargs.get("image_tokens")
        if latent_BCTHW is None or tokens_BNW is None:
            raise ValueError("A conditioning (positive or negative) carries no start image. Pass both through "
                             "DynamiCrafter Image to Video before sampling.")
        self._check_width("vision tower", tokens_BNW, self.params.resampler.embedding_dim, "CLIP_VISION")
        self._check_width("text encoder", kwargs["cross_attn"], self.params.context_dim, "CLIP")
        noise_shape = kwargs["noise"].shape
        if latent_BCTHW.shape[1:] != noise_shape[1:]:
            raise ValueError(f"The latent is {_size(noise_shape)}, the conditioning was made for "
                             f"{_size(latent_BCTHW.shape)} (channels, frames, height, width). Use the latent of "
                             "DynamiCrafter Image to Video, or give that node the same size and frames.")
        if noise_shape[0] % len(latent_BCTHW):
            raise ValueError(f"The latent is a batch of {noise_shape[0]}, the conditioning of {len(latent_BCTHW)}. "
                             "Give DynamiCrafter Image to Video the same batch size.")
        fs = kwargs.get("frame_stride") or self.params.default_fs
        out["c_concat"] = comfy.conds.CONDNoiseShape(self.process_latent_in(latent_BCTHW))
        out["image_tokens"] = comfy.conds.CONDRegular(tokens_BNW)
        out["frame_stride"] = comfy.conds.CONDRegular(torch.tensor([fs]))
        return out

    @staticmethod
    def _check_width(tower: str, tokens_BNW: torch.Tensor, width: int, socket: str) -> None:
        if tokens_BNW.shape[-1] != width:
            raise ValueError(f"The {tower} gives tokens {tokens_BNW.shape[-1]} wide, this model was trained with "
                             f"{width}. Use the {socket} of Load DynamiCrafter, or core's loader with OpenCLIP ViT-H "
                             "for the published models.")


def _size(shape) -> str:
    return " x ".join(map(str, shape[1:]))


def keep_projected_context(executor, *args, **kwargs):
    """Wrapper around one whole sampler call: cross-attention keys are projected at its first step and kept to its end.

    Hooks may change the weights from step to step, so with hooks nothing is kept.
    """
    guider = executor.class_obj
    if not any("hooks" in cond for conds in guider.conds.values() for cond in conds):
        # A UserDict, because core copies plain dicts on their way to the network.
        guider.model_options.setdefault("transformer_options", {})["context_cache"] = UserDict()
    return executor(*args, **kwargs)


def make_model(unet: UNetParams, diffusion: DiffusionParams, scale_factor: float,
               weight_dtype: torch.dtype) -> DynamiCrafterModel:
    """The model without weights (on the meta device), to be loaded with `assign=True`."""
    config = DynamiCrafterConfig(unet, diffusion, scale_factor)
    device = comfy.model_management.get_torch_device()
    config.set_inference_dtype(weight_dtype, comfy.model_management.unet_manual_cast(
        weight_dtype, device, config.supported_inference_dtypes))
    return config.get_model({}, device=torch.device("meta"))


def make_patcher(model: DynamiCrafterModel) -> comfy.model_patcher.ModelPatcher:
    """MODEL around a loaded model."""
    # Newer versions stream weights through a patcher of their own.
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    patcher = kind(model, load_device=comfy.model_management.get_torch_device(),
                   offload_device=comfy.model_management.unet_offload_device())
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "stillmotion_context", keep_projected_context)
    return patcher
