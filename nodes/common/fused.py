"""Operations of the networks that are several in PyTorch and one kernel on a GPU with Triton, with the same numbers.

The kernels are for GPUs and for inference. Elsewhere, in training and under torch.compile, which joins operations by
itself, PyTorch's operations are used. Norms are given as layers, because ComfyUI may hold their weights elsewhere, in
another precision or with patches; then their own `forward` is used.

Tensor names end in their layout: B videos, F frames, L = F * rows * columns tokens, C channels, P pairs of channels of
a head, K tokens of a ring, N clips or frames, T frames of a clip, H, W height and width.
"""
from __future__ import annotations

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def kernels_for(x: Tensor):
    """The kernels if they can be used for `x`, else None."""
    if not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return gpu_kernels(x.device)


def is_plain(norm: nn.Module, x: Tensor) -> bool:
    """Whether a norm's weights can be read as they are: on the device, in the precision of `x`, without patches."""
    weight = norm.weight
    if getattr(norm, "weight_function", None) or getattr(norm, "bias_function", None):
        return False
    return weight is None or (weight.device == x.device and weight.dtype == x.dtype)


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
    if kernels is not None and is_plain(norm, x_BLC):
        weights = (norm.weight, norm.bias) if scale_BFC is None else (scale_BFC, shift_BFC)
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
    if kernels is not None and is_plain(norm, x_BLC):
        return kernels.norm_rotate(x_BLC, norm.weight, norm.eps, rotation_LP2, heads, ring_BKC, slots_F)
    turned_BLC = rotate(norm(x_BLC), rotation_LP2, heads)
    return turned_BLC if ring_BKC is None else store(ring_BKC, turned_BLC, slots_F)


def gated_gelu(x: Tensor) -> Tensor:
    """GEGLU (arXiv 2002.05202): the first half of the last axis times GELU of the second."""
    kernels = kernels_for(x)
    if kernels is not None:
        return kernels.gated_gelu(x)
    x, gate = x.chunk(2, dim=-1)
    return x * F.gelu(gate)


def group_norm(x: Tensor, norm: nn.GroupNorm, silu: bool = True, add_NC: Tensor | None = None) -> Tensor:
    """Group norm of x + add, then SiLU; x [N, C, H, W] or [N, C, T, H, W] in any memory layout, which is kept."""
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    layout = last if x.is_contiguous(memory_format=last) else torch.contiguous_format
    kernels = kernels_for(x)
    if kernels is not None and layout is last and is_plain(norm, x):
        return kernels.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, add_NC, silu)
    if add_NC is not None:
        x = x + add_NC.unflatten(1, (-1, *[1] * (x.ndim - 2)))
    x = norm(x)
    if silu:
        x = F.silu(x, inplace=not torch.is_grad_enabled())
    return x.contiguous(memory_format=layout)
