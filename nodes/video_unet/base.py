"""The video U-Net as one of ComfyUI's models: configuration, conditioning, memory and saving."""
from __future__ import annotations

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

from ..diffusion.schedule import make_alphas_cumprod
from .config import HEADER, TEXT_ENCODERS, VideoUNetConfig, to_json
from .unet import VideoUNet

ENCODER_SOURCES = {"demo": "Load DynamiCrafter with its checkpoint demo",
                   "clip_l": "core's Load CLIP with CLIP-L, type stable_diffusion"}


class ClipLatent(comfy.latent_formats.SD15):
    """Clips [B, C, T, H, W] of latents or pixels, multiplied by one factor."""

    latent_dimensions = 3

    def __init__(self, channels: int, scale_factor: float):
        super().__init__(scale_factor)
        self.latent_channels = channels
        self.taesd_decoder_name = None  # core's TAESD preview takes single images only
        if channels != 4:
            self.latent_rgb_factors = None if channels != 3 else torch.eye(3).tolist()


class HostCalls:
    """Put before a network class: core's names of the arguments, and the wrappers of other packs."""

    def forward(self, x, timesteps, context, transformer_options={}, additional_condition=None, **_):
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        executor = WrapperExecutor.new_class_executor(super().forward, self, wrappers)
        return executor.execute(x, timesteps, context, additional_condition, transformer_options=transformer_options)


class VideoUNetModelConfig(comfy.supported_models_base.BASE):
    """Core's description of a model. Our own sizes stay in one opaque entry, since core reads known names in it."""

    unet_extra_config = {}
    memory_usage_factor = 1.2

    def __init__(self, config: VideoUNetConfig, network: type[VideoUNet]):
        self.latent_format = lambda: ClipLatent(config.params.channels, config.scale_factor)
        super().__init__({"params": config.params})
        self.video_unet, self.network = config, network

    def model_type(self, state_dict, prefix=""):
        kinds = comfy.model_base.ModelType
        return kinds.V_PREDICTION if self.video_unet.prediction == "v" else kinds.EPS

    def get_model(self, state_dict, prefix="", device=None):
        return VideoUNetModel(self, self.model_type(state_dict, prefix), device)

    def process_unet_state_dict_for_saving(self, state_dict):
        """Core's Save Model writes no header of ours, so the configuration travels as the bytes of its JSON."""
        text = torch.tensor(list(to_json(self.video_unet).encode()), dtype=torch.uint8)
        return {**super().process_unet_state_dict_for_saving(state_dict), HEADER: text}


class VideoUNetModel(comfy.model_base.BaseModel):
    """`video_unet` is the `VideoUNetConfig`; `diffusion_params` tells samplers its schedule, in core's table too."""

    def __init__(self, model_config: VideoUNetModelConfig, model_type, device=None):
        managed = type("ManagedVideoUNet", (HostCalls, model_config.network), {})
        super().__init__(model_config, model_type, device,
                         lambda params, operations, **factory: managed(params, operations, optimized_attention,
                                                                       **factory))
        self.video_unet = model_config.video_unet
        self.diffusion_params = self.video_unet.diffusion
        alphas = make_alphas_cumprod(self.diffusion_params)
        self.model_sampling.set_sigmas(((1 - alphas) / alphas).sqrt())

    def extra_conds(self, **kwargs):
        """Text tokens, and the given frames with their mask, put into the conditioning by Video U-Net Conditions.

        Entries of the conditioning, all optional: "concat_latent_image" [B, C, T, h, w], "concat_mask"
        [B, 1, T, h or 1, w or 1] with 0 where a frame is given (as in core), "additional_condition" [B, D]. Raises
        ValueError for text of another encoder and for frames of another size than the latent.
        """
        out = super().extra_conds(**kwargs)
        self._check_text(kwargs["cross_attn"])
        frames_BCTHW = self._given_frames(kwargs["noise"], kwargs.get("concat_latent_image"),
                                          kwargs.get("concat_mask"))
        out["c_concat"] = comfy.conds.CONDNoiseShape(frames_BCTHW)
        if "additional_condition" in kwargs:
            out["additional_condition"] = comfy.conds.CONDRegular(kwargs["additional_condition"])
        return out

    def _check_text(self, text_BLC: torch.Tensor) -> None:
        encoder, width = self.video_unet.text_encoder, TEXT_ENCODERS[self.video_unet.text_encoder]
        if text_BLC.shape[-1] != width:
            raise ValueError(f"The text encoder gives tokens {text_BLC.shape[-1]} wide; this model was trained with "
                             f"{encoder}, {width} wide. Take the CLIP of {ENCODER_SOURCES[encoder]}.")

    def _given_frames(self, noise_BCTHW, latent_BCTHW, mask_B1THW) -> torch.Tensor:
        """[B, C + 1, T, h, w]: the given frames as the network sees them, then 1 where a frame is given."""
        if latent_BCTHW is None or mask_B1THW is None:
            return torch.zeros_like(noise_BCTHW[:, :1]).repeat(1, noise_BCTHW.shape[1] + 1, 1, 1, 1)
        if latent_BCTHW.shape[1:] != noise_BCTHW.shape[1:]:
            raise ValueError(f"The latent is {_size(noise_BCTHW)}, the conditioning was made for "
                             f"{_size(latent_BCTHW)} (channels, frames, height, width). Use the latent of Video U-Net "
                             "Conditions, or give that node the same size and frames.")
        if len(noise_BCTHW) % len(latent_BCTHW):
            raise ValueError(f"The latent is a batch of {len(noise_BCTHW)}, the conditioning of {len(latent_BCTHW)}. "
                             "Give Video U-Net Conditions the same batch size.")
        given_B1THW = (1 - mask_B1THW.to(latent_BCTHW)).expand(len(latent_BCTHW), 1, *latent_BCTHW.shape[2:])
        return torch.cat((self.process_latent_in(latent_BCTHW) * given_B1THW, given_B1THW), dim=1)


def _size(latent_BCTHW) -> str:
    return " x ".join(map(str, latent_BCTHW.shape[1:]))


def make_model(config: VideoUNetConfig, weight_dtype: torch.dtype, network: type[VideoUNet] = VideoUNet,
               device: str = "meta") -> VideoUNetModel:
    """The model without weights (on the meta device), to be loaded with `assign=True`.

    `network`: a subclass of `VideoUNet`, for conditions of another kind.
    """
    model_config = VideoUNetModelConfig(config, network)
    load_device = comfy.model_management.get_torch_device()
    model_config.set_inference_dtype(weight_dtype, comfy.model_management.unet_manual_cast(
        weight_dtype, load_device, model_config.supported_inference_dtypes))
    return model_config.get_model({}, device=torch.device(device))


def make_patcher(model: VideoUNetModel) -> comfy.model_patcher.ModelPatcher:
    """MODEL around a loaded model."""
    # Newer versions stream weights through a patcher of their own.
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return kind(model, load_device=comfy.model_management.get_torch_device(),
                offload_device=comfy.model_management.unet_offload_device())
