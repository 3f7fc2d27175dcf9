"""Fast training on a CPU core or a GPU: bfloat16 where it is multiplied, channels-last images, fused normalisation.

Measured on one core with matrix units (AMX): a 3x3 convolution of 64 channels runs at 0.7 TFLOP/s in bfloat16, at 0.07
in float32. A core without them emulates bfloat16, eight times slower than float32. PyTorch's own GroupNorm backward
takes three quarters of a step in channels-last; compiled, the whole step is four times as fast.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from comfy import model_management
from comfy.ldm.modules.diffusionmodules.model import AttnBlock, Upsample
from torch import Tensor, nn

from ...common.attention import torch_attention
from ...dynamicrafter import unet
from ..loop import fit
from ..parallel import OneProcess


def device() -> torch.device:
    """Where the demo models are trained: ComfyUI's GPU, or the CPU. Encodings stay in main memory."""
    return model_management.get_torch_device()


def autocast() -> torch.autocast:
    """Convolutions and matmuls in bfloat16 on a GPU or CPU that multiplies it; weights stay in float32."""
    place = device()
    able = torch.ops.mkldnn._is_mkldnn_bf16_supported() if place.type == "cpu" else \
        model_management.should_use_bf16(place)
    return torch.autocast(place.type, torch.bfloat16, enabled=able)


class FastPrecision(OneProcess):
    """The whole training in this process, with `autocast`."""

    def autocast(self):
        return autocast()


def fit_compiled(net: nn.Module, loss_of: Callable[..., Tensor], parts: Sequence[Callable], **settings) -> nn.Module:
    """`fit` with `autocast`, and with `parts` of the computation compiled for the shapes they are called with, on a GPU
    as CUDA graphs. The first call takes minutes, then the result is cached on disk. `loss_of(number, generator,
    *parts)` computes the loss with them."""
    net.to(device())
    mode = None if device().type == "cpu" else "reduce-overhead"
    compiled = [torch.compile(part, dynamic=False, mode=mode) for part in parts]
    checked = []

    def loss(number: int, generator: torch.Generator) -> Tensor:
        if not checked:
            state = generator.get_state()
            check_gradients(net, *(lambda p=p: loss_of(number, generator.set_state(state), *p)
                                   for p in (parts, compiled)))
            generator.set_state(state)
            checked.append(True)
        return loss_of(number, generator, *compiled)

    return fit(net, loss, processes=FastPrecision(), **settings)


def check_gradients(net: nn.Module, loss_of: Callable[[], Tensor], compiled_loss_of: Callable[[], Tensor],
                    tolerance: float = 0.5, precision: OneProcess = FastPrecision()) -> None:
    """Raise RuntimeError if compilation changes a gradient by more than half: bfloat16 accounts for a fifth."""
    found = []
    for loss in (loss_of, compiled_loss_of):
        net.zero_grad(set_to_none=True)
        with precision.autocast():
            value = loss()
        value.backward()
        found.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    net.zero_grad(set_to_none=True)
    whole = torch.stack([gradient.norm() for gradient in found[0].values()]).norm()
    wrong = [name for name, gradient in found[0].items() if gradient.norm() > 1e-3 * whole
             and not (found[1][name] - gradient).norm() <= tolerance * gradient.norm()]
    if wrong:
        raise RuntimeError(f"This PyTorch ({torch.__version__}) compiles to wrong gradients of {len(wrong)} weights "
                           f"({', '.join(wrong[:3])}, ...). Use `fit` alone, several times slower, or another "
                           "version.")


def channels_last(net: nn.Module) -> nn.Module:
    """Convert the weights of 2-D convolutions to channels-last; their outputs then are channels-last too."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return net


def plain_attention(q_BCHW: Tensor, k_BCHW: Tensor, v_BCHW: Tensor) -> Tensor:
    """The attention of an autoencoder's middle block, without the free-memory query, which cannot be compiled."""
    q, k, v = (x.flatten(2).transpose(1, 2) for x in (q_BCHW, k_BCHW, v_BCHW))
    weights_BNN = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights_BNN @ v).transpose(1, 2).reshape(q_BCHW.shape)


def twice(x_BCHW: Tensor) -> Tensor:
    """Nearest 2x upsampling by repetition: in channels-last the compiler (PyTorch 2.13) loses the gradient of
    `interpolate`."""
    batch, channels, height, width = x_BCHW.shape
    repeated = x_BCHW[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
    return repeated.reshape(batch, channels, 2 * height, 2 * width)


class PlainUpsample(Upsample):
    def forward(self, x_BCHW: Tensor, *_) -> Tensor:  # newer releases also pass arguments for video only
        return self.conv(twice(x_BCHW))


class PlainVideoUpsample(unet.Upsample):
    def forward(self, x_NCHW: Tensor, step) -> Tensor:
        return self.conv(twice(x_NCHW))


def float_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **_) -> Tensor:
    """Softmax attention, on a CPU in float32: its fused kernel runs backward five times faster than in bfloat16."""
    if not q.is_cpu:
        return torch_attention(q, k, v, heads)
    with torch.autocast("cpu", enabled=False):
        return torch_attention(q.float(), k.float(), v.float(), heads).to(q.dtype)


def make_compilable(net: nn.Module) -> nn.Module:
    """Replace layers of a ComfyUI autoencoder or a video U-Net by equivalents that can be compiled, with the same
    weights and results, and use fast attention."""
    for module in net.modules():
        if isinstance(module, AttnBlock):
            module.optimized_attention = plain_attention
        if hasattr(module, "attention"):
            module.attention = float_attention
        for old, plain in ((Upsample, PlainUpsample), (unet.Upsample, PlainVideoUpsample)):
            if type(module) is old:
                module.__class__ = plain
    return net
