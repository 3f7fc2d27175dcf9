"""Operations of the networks that are several in PyTorch and one kernel on a GPU with Triton, with the same numbers.

The kernels are for GPUs and for inference. Elsewhere, in training and under torch.compile, which joins operations by
itself, PyTorch's operations are used. Layers are given whole, because ComfyUI may hold their weights elsewhere, in
another precision or with patches; `lent` asks for them.

Tensor names end in their layout: B videos, F frames, L = F * rows * columns tokens, C channels, P pairs of channels of
a head, K tokens of a ring, N clips or frames, T frames of a clip, H, W height and width.
"""
from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

fetch = None  # how the host lends the weights of its layers; `core_model.py` sets it, see `lend` there


@cache
def gpu_kernels(device: torch.device):
    """The module of Triton kernels, or None where it does not work, such as without Triton or a C compiler."""
    try:
        from . import kernels
        x = torch.ones(1, 1, 64, device=device)
        torch.testing.assert_close(kernels.gated_gelu(x), F.gelu(x[..., :32]))
    except Exception as error:  # Triton has no common class of errors, and many ways to be unusable
        logging.getLogger(__name__).warning("Stillmotion uses PyTorch's operations on %s, not its faster Triton "
                                            "kernels: %s", device, error)
        return None
    return kernels


@cache
def gpu_products(device: torch.device):
    """The module of Triton kernels with matrix products, or None where it does not work."""
    try:
        from . import kernels_products
        x = torch.ones(1, 1, 32, 32, device=device, dtype=torch.float16)
        gated = kernels_products.gated_linear(x, x[0, 0] / 32, x[0, 0, 0])
        torch.testing.assert_close(gated, 2 * F.gelu(2 * x[..., :16]), rtol=1e-2, atol=0)
        mixed = torch.empty_like(x)
        kernels_products.attend(x, mixed, [(x, x)], 1)
        torch.testing.assert_close(mixed, x, rtol=1e-2, atol=0)
    except Exception as error:  # as above; a GPU may also have too little shared memory for them
        logging.getLogger(__name__).warning("Stillmotion uses PyTorch's matrix products and attention on %s, not its "
                                            "Triton kernels: %s", device, error)
        return None
    return kernels_products


@cache
def gpu_applies_gelu(device: torch.device) -> bool:
    """Whether the product of PyTorch that applies GELU has the tanh form. NVIDIA's has, others have the exact one."""
    x = torch.arange(-48, 48, device=device)[None] / 16
    found = torch._addmm_activation(torch.zeros(96, device=device), x, torch.eye(96, device=device), use_gelu=True)
    return (found - F.gelu(x, approximate="tanh")).abs().max().item() < 1e-5  # the forms differ by 5e-4


def for_gpu(x: Tensor) -> bool:
    """Whether operations for inference on a GPU, that no compiler will see, can be used for `x`."""
    return x.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def applies_gelu(x: Tensor) -> bool:
    return for_gpu(x) and gpu_applies_gelu(x.device)


def kernels_for(x: Tensor):
    """The kernels if they can be used for `x`, else None."""
    return gpu_kernels(x.device) if for_gpu(x) else None


def products_for(x: Tensor):
    """The kernels with matrix products if they can be used for `x`, else None."""
    return None if kernels_for(x) is None else gpu_products(x.device)


def lent(layer: nn.Module, x: Tensor) -> AbstractContextManager[tuple[Tensor | None, Tensor | None]] | None:
    """Weight and bias of a layer as `x` needs them, valid inside the context. None if only the layer itself can compute
    with them: they are quantised, or its `forward` was replaced, as by a LoRA in bypass mode."""
    if getattr(layer.forward, "__func__", None) is not type(layer).forward:
        return None
    weight, bias = layer.weight, getattr(layer, "bias", None)
    patched = getattr(layer, "weight_function", None) or getattr(layer, "bias_function", None)
    if weight is None or (type(weight) is nn.Parameter and not patched and weight.device == x.device
                          and weight.dtype == x.dtype):
        return nullcontext((weight, bias))
    return None if fetch is None else fetch(layer, x)


def by_frame(x_BLC: Tensor, frames: int) -> Tensor:
    return x_BLC.unflatten(1, (frames, -1))


def add(x_BLC: Tensor, branch_BLC: Tensor, gate_BFC: Tensor | None) -> Tensor:
    """x + gate * branch with one gate for each frame; None: x + branch."""
    if gate_BFC is None:
        return x_BLC + branch_BLC
    frames = gate_BFC.shape[1]
    return torch.addcmul(by_frame(x_BLC, frames), by_frame(branch_BLC, frames), gate_BFC[:, :, None]).flatten(1, 2)


def add_norm(x_BLC: Tensor, branch_BLC: Tensor | None, gate_BFC: Tensor | None, norm: nn.LayerNorm,
             scale_BFC: Tensor | None = None, shift_BFC: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y = x + gate * branch, and norm(y) * (1 + scale) + shift. Without a branch y is x; without a scale: norm(y)."""
    kernels = kernels_for(x_BLC)
    if kernels is not None and (own := lent(norm, x_BLC)) is not None:
        with own as weights:
            weights = weights if scale_BFC is None else (scale_BFC, shift_BFC)
            return kernels.add_norm(x_BLC, branch_BLC, gate_BFC, *weights, norm.eps)
    if branch_BLC is not None:
        x_BLC = add(x_BLC, branch_BLC, gate_BFC)
    normed_BLC = norm(x_BLC)
    if scale_BFC is None:
        return x_BLC, normed_BLC
    frames = scale_BFC.shape[1]
    scaled = torch.addcmul(shift_BFC[:, :, None], by_frame(normed_BLC, frames), 1 + scale_BFC[:, :, None])
    return x_BLC, scaled.flatten(1, 2)


def rotate(x_BLC: Tensor, rotation_LP2: Tensor, heads: int) -> Tensor:
    """Rotate adjacent channel pairs of each head by (cos, sin), in float32; returns the dtype of the input."""
    pairs = x_BLC.float().unflatten(-1, (heads, -1, 2))
    if torch.compiler.is_compiling():  # compilers do not handle complex numbers
        (real, imaginary), (cos, sin) = pairs.unbind(-1), rotation_LP2[:, None].unbind(-1)
        turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation_LP2)[:, None])
    return turned.flatten(-3).to(x_BLC.dtype)


def store(ring_BKC: Tensor, x_BLC: Tensor, slots_F: Tensor) -> Tensor:
    """Write frames into the slots of a ring, in place; returns the ring."""
    ring_BKC.unflatten(1, (-1, x_BLC.shape[1] // len(slots_F))).index_copy_(1, slots_F, by_frame(x_BLC, len(slots_F)))
    return ring_BKC


def norm_rotate(x_BLC: Tensor, norm: nn.RMSNorm, rotation_LP2: Tensor, heads: int, ring_BKC: Tensor | None = None,
                slots_F: Tensor | None = None) -> Tensor:
    """Norm, then rotation. With a ring, the result is stored in its slots and the ring returned."""
    kernels = kernels_for(x_BLC)
    if kernels is not None and (own := lent(norm, x_BLC)) is not None:
        with own as (weight, _):
            return kernels.norm_rotate(x_BLC, weight, norm.eps, rotation_LP2, heads, ring_BKC, slots_F)
    turned_BLC = rotate(norm(x_BLC), rotation_LP2, heads)
    return turned_BLC if ring_BKC is None else store(ring_BKC, turned_BLC, slots_F)


def gated_gelu(x: Tensor) -> Tensor:
    """GEGLU (arXiv 2002.05202): the first half of the last axis times GELU of the second."""
    kernels = kernels_for(x)
    if kernels is not None:
        return kernels.gated_gelu(x)
    x, gate = x.chunk(2, dim=-1)
    return x * F.gelu(gate)


def geglu(x: Tensor, proj: nn.Linear) -> Tensor:
    """A linear layer, then `gated_gelu`."""
    products = products_for(x)
    if products is not None and x.dtype in products.HALF and (own := lent(proj, x)) is not None:
        with own as (weight, bias):
            return products.gated_linear(x, weight, bias)
    return gated_gelu(proj(x))


def linear_gelu(x: Tensor, linear: nn.Linear) -> Tensor:
    """A linear layer, then GELU in its tanh form."""
    if applies_gelu(x) and (own := lent(linear, x)) is not None:
        with own as (weight, bias):
            y = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
            return y.unflatten(0, x.shape[:-1])
    return F.gelu(linear(x), approximate="tanh")


def project(x: Tensor, layers: Sequence[nn.Linear]) -> Sequence[Tensor]:
    """Linear layers of one input, all without biases. In one product where the kernels take views of its result."""
    if products_for(x) is not None and None not in (owns := [lent(layer, x) for layer in layers]):
        weights = []
        for layer, own in zip(layers, owns):
            with own as (weight, _):  # a streamed one is valid until the next
                weights.append(weight if weight is layer.weight else weight.clone())
        return F.linear(x, torch.cat(weights)).chunk(len(layers), dim=-1)
    return [layer(x) for layer in layers]


def last_layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def is_last(x: Tensor) -> bool:
    """Whether an image or clip is channels-last in memory."""
    return x.is_contiguous(memory_format=last_layout(x))


def conv_apart(conv: nn.Module, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """A convolution, and what is still to be added to each of its channels: its bias, if a kernel can do that on the
    way, and the given one ([C] or [N, C])."""
    if kernels_for(x) is None or not is_last(x) or (own := lent(conv, x)) is None:
        return conv(x), bias
    with own as (weight, own_bias):
        y = conv._conv_forward(x, weight, None)
        if bias is not None:
            return y, bias + own_bias
        return y, own_bias if own_bias is conv.bias else own_bias.clone()  # a streamed one is valid until here


def of_channels(bias: Tensor, x: Tensor) -> Tensor:
    """[C] or [N, C] as a tensor that can be added to x [N, C, ...]."""
    return bias.unflatten(-1, (-1, *[1] * (x.ndim - 2)))


def add_bias(x: Tensor, branch: Tensor, bias_C: Tensor | None) -> Tensor:
    """x + (branch + bias), as `conv_apart` gives branch and bias."""
    if bias_C is None:
        return x + branch
    kernels = kernels_for(x)
    if kernels is not None and is_last(x) and is_last(branch):
        return kernels.add_bias(x, branch, bias_C)
    return x + (branch + of_channels(bias_C, x))


def group_norm(x: Tensor, norm: nn.GroupNorm, silu: bool = True, add: Tensor | None = None) -> Tensor:
    """Group norm of x + add, then SiLU; x [N, C, H, W] or [N, C, T, H, W] in any memory layout, which is kept.
    add: [N, C] or [C]."""
    kernels = kernels_for(x)
    if kernels is not None and is_last(x) and (own := lent(norm, x)) is not None:
        with own as (weight, bias):
            return kernels.group_norm(x, norm.num_groups, weight, bias, norm.eps, add, silu)
    layout = last_layout(x) if is_last(x) else torch.contiguous_format
    if add is not None:
        x = x + of_channels(add, x)
    x = norm(x)
    if silu:
        x = F.silu(x, inplace=not torch.is_grad_enabled())
    return x.contiguous(memory_format=layout)


def add_group_norm(x: Tensor, branch: Tensor, bias_C: Tensor | None, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """y = x + (branch + bias), and SiLU of the group norm of y."""
    kernels = kernels_for(x)
    if kernels is not None and is_last(x) and is_last(branch) and (own := lent(norm, x)) is not None:
        with own as weights:
            return kernels.add_group_norm(x, branch, bias_C, norm.num_groups, *weights, norm.eps)
    y = add_bias(x, branch, bias_C)
    return y, group_norm(y, norm)
