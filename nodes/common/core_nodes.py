"""Core's nodes on the video U-Nets: what they need from a model, what a context window sees, and which are rejected.

Layouts: B clips, C channels, T frames, H, W latent height and width.
"""
from __future__ import annotations

import comfy.model_base
import comfy.model_patcher
from comfy.patcher_extension import WrappersMP

from . import core_model

FRAMES = 2  # axis of [B, C, T, H, W]


class ClipModel(comfy.model_base.BaseModel):
    """A video U-Net whose only condition with a frame axis is `c_concat` [B, C, T, H, W]."""

    def __init__(self, model_config, model_type, device, unet_model):
        super().__init__(model_config, model_type, device, unet_model)
        params = self.diffusion_model.params
        # FreeU reads the first, RenormCFG the second. With more names in `unet_config` core would treat the network as
        # Stable Diffusion and look for those keys.
        model_config.unet_config["model_channels"] = params.model_channels
        self.diffusion_model.in_channels = params.in_channels

    def resize_cond_for_context_window(self, cond_key, cond_value, window, x_in, device, retain_index_list=[]):
        """Called by core's context windows since 0.18. By default they slice every axis as long as the clip."""
        if cond_key == "c_concat":
            return cond_value._copy_with(window.get_tensor(cond_value.cond, device, dim=FRAMES,
                                                           retain_index_list=retain_index_list))
        return cond_value

    def apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        """Before 0.8 core's context windows do not slice `c_concat`; it keeps the length of the clip."""
        if c_concat is not None and c_concat.shape[FRAMES] != x.shape[FRAMES]:
            c_concat = transformer_options["context_window"].get_tensor(c_concat, dim=FRAMES)
        return super().apply_model(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


def make_clip_patcher(model: ClipModel) -> comfy.model_patcher.ModelPatcher:
    """MODEL around a loaded model."""
    patcher = core_model.make_patcher(model)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "stillmotion_core_nodes", refuse_misfits)
    return patcher


def refuse_misfits(executor, noise, *args, **kwargs):
    """Wrapper around a whole sampler call. Raises ValueError for a core node that does not work on this MODEL."""
    guider = executor.class_obj
    options, network = guider.model_options, guider.model_patcher.model.diffusion_model
    check_nodes(nodes_on(options), network, len(noise))
    if "rope_options" in options.get("transformer_options", {}):
        raise ValueError("ScaleROPE changes rotary positions, but this network has none. Remove that node from the "
                         "model.")
    if "context_handler" in options:
        check_windows(options["context_handler"], noise.shape)
    return executor(noise, *args, **kwargs)


def nodes_on(model_options: dict) -> set[str]:
    """Core modules whose functions patch a MODEL: {"nodes_sag", ...}."""
    options = model_options.get("transformer_options", {})
    functions = [model_options.get("sampler_cfg_function"), *model_options.get("sampler_post_cfg_function", [])]
    for placed in options.get("patches", {}).values():
        functions += placed
    # Core uses the full path as the module name of its nodes.
    return {str(getattr(function, "__module__", "")).replace("\\", "/").split("/")[-1].split(".")[-1]
            for function in functions}


def check_nodes(modules: set[str], network, clips: int) -> None:
    """Raise ValueError for a core node that cannot work on `network` (`params`, `stride`, `frame_attention`)."""
    width, mults = network.params.model_channels, network.params.channel_mult
    if "nodes_sag" in modules:
        raise ValueError("Self-Attention Guidance blurs single images and cannot work on clips. Remove that node from "
                         "the model. Perturbed-Attention Guidance has the same purpose and works here.")
    if "nodes_video_model" in modules:
        raise ValueError("Video Linear and Triangle CFG Guidance vary guidance over the images of a batch, but the "
                         "frames of this model are on the time axis, so all of them would get the smallest value. "
                         "Remove that node from the model and set cfg in the sampler.")
    if "nodes_freelunch" in modules and not {2, 4} & set(mults):
        raise ValueError(f"FreeU changes levels that are {2 * width} or {4 * width} channels wide (2 or 4 times "
                         f"model_channels), but this network has {', '.join(str(width * mult) for mult in mults)}. "
                         "Remove that node from the model: it would have no effect.")
    for module, node in (("nodes_hypertile", "HyperTile"), ("nodes_tomesd", "TomePatchModel")):
        if module in modules and 1 not in network.frame_attention:
            raise ValueError(f"{node} speeds up attention within the frame at the latent's full size, but this network "
                             "has none there. Remove that node from the model: it would have no effect.")
    if "nodes_pag" in modules and network.stride not in network.frame_attention:
        raise ValueError("Perturbed-Attention Guidance changes attention within the frame in the middle of the "
                         "network, but this network has none there. Remove that node from the model, or train a "
                         "network with its deepest level in spatial_attention.")
    if "nodes_lumina2" in modules and clips > 1:
        raise ValueError(f"RenormCFG takes one clip at a time, but the latent is a batch of {clips}. Set the batch "
                         "size to 1, or use guidance_rescale of DDIM Sampler (fixed) instead.")


def check_windows(handler, shape_BCTHW) -> None:
    """Raise ValueError for context windows on an axis other than frames, not shorter than the clip, or on a batch."""
    clips, frames = shape_BCTHW[0], shape_BCTHW[FRAMES]
    if handler.dim != FRAMES:
        raise ValueError(f"The context windows are along dim {handler.dim}, but the frames of this model are dim "
                         f"{FRAMES} of [batch, channels, frames, height, width]. Set dim to {FRAMES} in Context "
                         "Windows (Manual).")
    if handler.context_length >= frames:
        raise ValueError(f"The context windows are {handler.context_length} frames long, but the clip has only "
                         f"{frames}. Remove that node from the model, or set a smaller context_length.")
    if clips > 1:
        raise ValueError(f"Core's context windows take one clip at a time, but the latent is a batch of {clips}. Set "
                         "the batch size to 1 and queue once per seed.")
