"""The video U-Net as one of ComfyUI's models: configuration, conditioning, memory and saving."""
from __future__ import annotations

import comfy.conds
import torch
from comfy.ldm.modules.attention import optimized_attention

from ..common.core_model import (
    ClipLatent,
    HostNetwork,
    ModelConfig,
    build_model,
    call_wrapped,
    check_condition,
    check_width,
    prediction_type,
)
from ..common.core_nodes import ClipModel
from ..ddim.schedule import make_alphas_cumprod
from .config import HEADER, TEXT_ENCODERS, VideoUNetConfig, to_json
from .unet import VideoUNet

ENCODER_SOURCES = {"demo": "Load DynamiCrafter with its checkpoint demo",
                   "demo, 96x96": "Load DynamiCrafter with its checkpoint \"demo, 96x96\"",
                   "clip_l": "core's Load CLIP with CLIP-L, type stable_diffusion"}


class HostCalls(HostNetwork):
    """Mixin for a network class: core's argument names, and the wrappers of other packs."""

    channels_last = True

    def forward(self, x, timesteps, context, transformer_options={}, additional_condition=None, **_):
        return call_wrapped(super().forward, self, x, timesteps, context, additional_condition,
                            transformer_options=transformer_options)


class VideoUNetModelConfig(ModelConfig):
    def __init__(self, config: VideoUNetConfig, network: type[VideoUNet]):
        self.latent_format = lambda: ClipLatent(config.scale_factor, config.params.channels)
        self.model_class = VideoUNetModel
        super().__init__(config.params)
        self.video_unet, self.network = config, network

    def model_type(self, state_dict, prefix=""):
        return prediction_type(self.video_unet.prediction)

    def process_unet_state_dict_for_saving(self, state_dict):
        """Core's Save Model does not write our header, so the configuration is stored as the bytes of its JSON."""
        text = torch.tensor(list(to_json(self.video_unet).encode()), dtype=torch.uint8)
        return {**super().process_unet_state_dict_for_saving(state_dict), HEADER: text}


class VideoUNetModel(ClipModel):
    """`video_unet` is the `VideoUNetConfig`; `diffusion_params` is its schedule, which core's table has too."""

    def __init__(self, model_config: VideoUNetModelConfig, model_type, device=None):
        managed = type("ManagedVideoUNet", (HostCalls, model_config.network), {})
        super().__init__(model_config, model_type, device,
                         lambda params, operations, **factory: managed(params, operations, optimized_attention,
                                                                       **factory))
        self.video_unet = model_config.video_unet
        self.encoders_of = self.video_unet.text_encoder
        self.diffusion_params = self.video_unet.diffusion
        alphas = make_alphas_cumprod(self.diffusion_params)
        self.model_sampling.set_sigmas(((1 - alphas) / alphas).sqrt())

    def extra_conds(self, **kwargs):
        """Text tokens, and the given frames with their mask, added to the conditioning by Video U-Net Conditions.

        Entries of the conditioning, all optional: "concat_latent_image" [B, C, T, h, w], "concat_mask"
        [B, 1, T, h or 1, w or 1] with 0 where a frame is given (as in core), "additional_condition" [B, D]. Raises
        ValueError for text of another encoder and for frames of another size than the latent.
        """
        out = super().extra_conds(**kwargs)
        encoder = self.video_unet.text_encoder
        check_width("text encoder", kwargs["cross_attn"], TEXT_ENCODERS[encoder],
                    f"It was trained with {encoder}: use the CLIP of {ENCODER_SOURCES[encoder]}.")
        frames_BCTHW = self._given_frames(kwargs["noise"], kwargs.get("concat_latent_image"),
                                          kwargs.get("concat_mask"))
        out["c_concat"] = comfy.conds.CONDNoiseShape(frames_BCTHW)
        if "additional_condition" in kwargs:
            out["additional_condition"] = comfy.conds.CONDRegular(kwargs["additional_condition"])
        return out

    def _given_frames(self, noise_BCTHW, latent_BCTHW, mask_B1THW) -> torch.Tensor:
        """[B, C + 1, T, h, w]: the given frames as the network sees them, then 1 where a frame is given."""
        if latent_BCTHW is None or mask_B1THW is None:
            return torch.zeros_like(noise_BCTHW[:, :1]).repeat(1, noise_BCTHW.shape[1] + 1, 1, 1, 1)
        check_condition(latent_BCTHW, noise_BCTHW, "Video U-Net Conditions")
        given_B1THW = (1 - mask_B1THW.to(latent_BCTHW)).expand(len(latent_BCTHW), 1, *latent_BCTHW.shape[2:])
        return torch.cat((self.process_latent_in(latent_BCTHW) * given_B1THW, given_B1THW), dim=1)


def make_model(config: VideoUNetConfig, weight_dtype: torch.dtype, network: type[VideoUNet] = VideoUNet,
               device: str = "meta") -> VideoUNetModel:
    """The model without weights (on the meta device), to be loaded with `assign=True`.

    `network`: a subclass of `VideoUNet`, for other kinds of conditions.
    """
    return build_model(VideoUNetModelConfig(config, network), weight_dtype, device)
