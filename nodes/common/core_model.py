"""What every family needs to be a ComfyUI model: latent format, configuration, wrappers, loading, MODEL.

Only this module depends on core's model classes, so changes in core are handled in one place.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

from . import fused
from .images import SMALL
from .quantized import Quantized

# options of the loaders' weight_dtype; auto: ComfyUI chooses for the device
WEIGHT_DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
                 "fp8_e4m3fn": torch.float8_e4m3fn}

class ClipLatent(comfy.latent_formats.SD15):
    """Clips [B, C, T, h, w] of Stable Diffusion latents (or of pixels, C = 3), scaled by a single factor."""

    latent_dimensions = 3

    def __init__(self, scale_factor: float, channels: int = 4):
        super().__init__(scale_factor)
        self.taesd_decoder_name = None  # core's TAESD preview only supports single images
        self.preview_vae = None
        if channels != self.latent_channels:
            self.latent_channels = channels
            self.latent_rgb_factors = torch.eye(3).tolist() if channels == 3 else None

    def preview_with(self, vae, size: tuple[int, int] | None) -> None:
        """Decode the previews of a small model (`size`: width and height in pixels in training, None if unknown) with
        the VAE itself, which takes clips: its latents have colours of their own, and too few pixels to show."""
        if size and max(size) < SMALL:
            self.preview_vae, self.latent_rgb_factors = vae, torch.eye(3).tolist()

    @property
    def latent_rgb_factors_reshape(self):
        """Read by core when sampling starts, so each run has its own count of steps."""
        return NextFrame(self)


class NextFrame:
    """Reduces a clip to one frame for core's preview, at each step the next one: the preview moves."""

    def __init__(self, latent_format: ClipLatent):
        self.latent_format, self.step = latent_format, 0

    def __call__(self, x0_BCTHW: torch.Tensor) -> torch.Tensor:
        """[1, C, 1, h, w], or with a VAE for previews the frame itself in -1..1, [1, 3, 1, H, W]."""
        frame = self.step % x0_BCTHW.shape[2]
        self.step += 1
        x0_BCTHW = x0_BCTHW[:1, :, frame:frame + 1]
        vae = self.latent_format.preview_vae
        if vae is None:
            return x0_BCTHW
        return vae.decode(self.latent_format.process_out(x0_BCTHW)).movedim(-1, 1) * 2 - 1


class ModelConfig(comfy.supported_models_base.BASE):
    """Core's description of a model. Our own sizes are in one opaque entry, because core interprets names it knows.

    A family sets `latent_format`, `sampling_settings` and `model_class`, and defines what its network predicts.
    """

    unet_extra_config = {}
    memory_usage_factor = 1.2
    model_class: type[comfy.model_base.BaseModel]

    def __init__(self, params):
        super().__init__({"params": params})

    def get_model(self, state_dict, prefix="", device=None):
        return self.model_class(self, self.model_type(state_dict, prefix), device)


def prediction_type(parameterization: str):
    """Core's name for what a network predicts: "eps" or "v"."""
    kinds = comfy.model_base.ModelType
    return kinds.V_PREDICTION if parameterization == "v" else kinds.EPS


# How core's layers compute with weights in any place and precision; subclasses that replace it do more than that.
CASTING = {getattr(comfy.ops.disable_weight_init, kind).forward_comfy_cast_weights
           for kind in ("Linear", "Conv1d", "Conv2d", "Conv3d", "GroupNorm", "LayerNorm", "RMSNorm")}


def lend(layer: torch.nn.Module, x: torch.Tensor) -> AbstractContextManager | None:
    """Weight and bias of one of core's layers on the device of `x` and in its precision, with patches; core streams
    them there if need be. None for layers with another way to compute."""
    kind = getattr(type(layer), "forward_comfy_cast_weights", None)
    return _lent(layer, x) if kind in CASTING else None


@contextmanager
def _lent(layer, x) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    weight, bias, stream = comfy.ops.cast_bias_weight(layer, x, offloadable=True)
    try:
        yield weight, bias
    finally:
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)


fused.fetch = lend


class HostNetwork:
    """Mixin for a network class that core moves between devices."""

    channels_last = False  # whether the network's activations are, so that its weights had better be on a GPU

    def to(self, *args, memory_format: torch.memory_format | None = None, **kwargs):
        """Like `Module.to`, but with core's --force-channels-last every convolution gets the layout of its own number
        of dimensions: torch raises an error for a network with several."""
        super().to(*args, **kwargs)
        if memory_format is not None:
            layouts = {4: memory_format, 5: torch.channels_last_3d}
            for weight in self.parameters():
                if weight.ndim in layouts:
                    weight.data = weight.data.to(memory_format=layouts[weight.ndim])
        return self


def inference_dtype(base: comfy.model_base.BaseModel) -> torch.dtype:
    """The dtype in which a model computes."""
    return base.manual_cast_dtype or base.get_dtype()


def call_wrapped(forward, network, *args, transformer_options: dict, **kwargs):
    """Call `forward` of `network` inside the wrappers added by other packs."""
    wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
    executor = WrapperExecutor.new_class_executor(forward, network, wrappers)
    return executor.execute(*args, transformer_options=transformer_options, **kwargs)


def build_model(config: ModelConfig, weight_dtype: torch.dtype, device: str = "meta",
                quantized: Quantized | None = None):
    """The model of `config`, by default without weights (on the meta device), to be loaded with `assign=True`.

    `quantized`: the layers stored in 8 or 4 bits; they determine the layer class and the device.
    """
    if quantized:
        quantized.prepare(config)
        device = quantized.device
    compute_dtype = comfy.model_management.unet_manual_cast(
        None if quantized else weight_dtype, comfy.model_management.get_torch_device(),
        config.supported_inference_dtypes)
    config.set_inference_dtype(weight_dtype, compute_dtype)
    return config.get_model({}, device=torch.device(device))


def check_weight_dtype(name: str, names=tuple(WEIGHT_DTYPES)) -> None:
    """Raise ValueError for a `weight_dtype` that is not in `names`."""
    if name not in names:
        raise ValueError(f"weight_dtype is {name!r}. Choose one of {', '.join(names)}.")


def storage_dtype(name: str, tensors: dict[str, torch.Tensor], quantized: Quantized | None = None) -> torch.dtype:
    """Dtype in which a network's weights are stored. With quantised layers, "auto" is the device's compute dtype."""
    weights = [*tensors.values(), *(layer.weight for layer in (quantized or {}).values())]
    return WEIGHT_DTYPES[name] or comfy.model_management.unet_dtype(
        model_params=sum(weight.numel() for weight in weights),
        weight_dtype=None if quantized else comfy.utils.weight_dtype(tensors))


def make_patcher(model: comfy.model_base.BaseModel) -> comfy.model_patcher.ModelPatcher:
    """MODEL around a loaded model."""
    model.device = torch.device("cpu")  # built on the meta device, but the weights were loaded to the CPU
    gpu = comfy.model_management.get_torch_device().type != "cpu"
    if comfy.model_management.force_channels_last() or (gpu and model.diffusion_model.channels_last):
        model.diffusion_model.to(memory_format=torch.channels_last)
    return managed(model, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device())


def managed(module: torch.nn.Module, load_device, offload_device) -> comfy.model_patcher.ModelPatcher:
    """Put a network or tower under ComfyUI's memory management."""
    # Since 0.16 core streams weights through a separate patcher class if the device supports it.
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return kind(module, load_device=load_device, offload_device=offload_device)


def key_patches(patcher: comfy.model_patcher.ModelPatcher) -> dict:
    """Like the MODEL's `get_key_patches`: for each weight its value and convert function, then its patches.
    Core's own fails on entries that exist only in the state dict: scales and markers of 8-bit and 4-bit layers."""
    saved = patcher.model_state_dict()
    found = {}
    for key, _ in (*patcher.model.named_parameters(), *patcher.model.named_buffers()):
        if key in saved:
            weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
            if key in patcher.backup:
                weight = patcher.backup[key].weight
            if key in patcher.hook_backup:
                weight = patcher.hook_backup[key][0]
            found[key] = [(weight, convert or (lambda value, **_: value)), *patcher.patches.get(key, [])]
    return found


def check_width(tower: str, tokens_BNC: torch.Tensor, width: int, remedy: str) -> None:
    """Raise ValueError unless the tokens of a text encoder or vision tower are `width` wide; `remedy`: what to use."""
    if tokens_BNC.shape[-1] != width:
        raise ValueError(f"The {tower} gives tokens {tokens_BNC.shape[-1]} wide, but this model was trained with "
                         f"{width}. {remedy}")


def check_condition(latent_BCTHW: torch.Tensor, noise_BCTHW: torch.Tensor, node: str) -> None:
    """Raise ValueError unless the condition frames, made by node `node`, match the latent to be sampled."""
    if latent_BCTHW.shape[1:] != noise_BCTHW.shape[1:]:
        raise ValueError(f"The latent is {size_words(noise_BCTHW.shape[1:])}, but the conditioning was made for "
                         f"{size_words(latent_BCTHW.shape[1:])} (channels, frames, height, width). Use the latent from "
                         f"{node}, or set the same size and frames there.")
    if len(noise_BCTHW) % len(latent_BCTHW):
        raise ValueError(f"The latent is a batch of {len(noise_BCTHW)}, but the conditioning of {len(latent_BCTHW)}. "
                         f"Set the same batch size in {node}.")


def size_words(shape) -> str:
    """A shape formatted for a message: 4 x 16 x 32 x 32."""
    return " x ".join(map(str, shape))
