"""PyTorch's operations in place of the Triton kernels, so that any machine can run what a GPU with Triton runs."""
from collections import Counter

import torch
import torch.nn.functional as F
from stillmotion.nodes.causal_wan import attention as wan_attention
from stillmotion.nodes.common import attention, fused, patches
from stillmotion.nodes.dynamicrafter import unet
from stillmotion.nodes.video_unet import unet as video_unet


class PlainKernels:
    """The functions of kernels.py and kernels_products.py, with the number of calls of each."""

    HALF = (torch.float32, torch.float16, torch.bfloat16)  # the first too, in which differences are small
    MOST_KEYS = MOST_CHANNELS = 128

    def __init__(self):
        self.calls = Counter()

    def __getattribute__(self, name):
        found = object.__getattribute__(self, name)
        if callable(found):
            self.calls[name] += 1
        return found

    def add_norm(self, x, branch, gate, scale, shift, eps):
        total = x if branch is None else fused.add(x, branch, gate)
        if scale is None or scale.ndim == 1:
            return total, F.layer_norm(total, x.shape[-1:], scale, shift, eps)
        normed = fused.by_frame(F.layer_norm(total, x.shape[-1:], eps=eps), scale.shape[1])
        return total, torch.addcmul(shift[:, :, None], normed, 1 + scale[:, :, None]).flatten(1, 2)

    def norm_rotate(self, x, weight, eps, rotation, heads, ring, slots):
        turned = fused.rotate(F.rms_norm(x, x.shape[-1:], weight, eps), rotation, heads)
        return turned if ring is None else fused.store(ring, turned, slots)

    def gated_gelu(self, x):
        x, gate = x.chunk(2, dim=-1)
        return x * F.gelu(gate)

    def gated_linear(self, x, weight, bias):
        x, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
        return x * F.gelu(gate)

    def add_bias(self, x, branch, bias):
        return x + (branch + fused.of_channels(bias, x))

    def group_norm(self, x, groups, weight, bias, eps, add, silu):
        x = x if add is None else x + fused.of_channels(add, x)
        y = F.group_norm(x, groups, weight, bias, eps)
        return (F.silu(y) if silu else y).contiguous(memory_format=fused.last_layout(x))

    def add_group_norm(self, x, branch, add, groups, weight, bias, eps):
        y = x + branch if add is None else x + (branch + fused.of_channels(add, x))
        normed = F.silu(F.group_norm(y, groups, weight, bias, eps))
        return y, normed.contiguous(memory_format=fused.last_layout(x))

    def attend(self, q, out, sources, heads):
        parts = [[x.flatten(0, 1) for x in (q, *source)] for source in sources]
        out.copy_(sum(attention.torch_attention(*part, heads) for part in parts).view(q.shape))


def use(monkeypatch) -> PlainKernels:
    """Run the networks as on a GPU: channels-last, with these kernels."""
    found = PlainKernels()

    def product_with_gelu(bias, x, weight, use_gelu):
        found.calls["gelu"] += use_gelu
        return F.gelu(torch.addmm(bias, x, weight), approximate="tanh")

    monkeypatch.setattr(fused, "applies_gelu", lambda x: not torch.is_grad_enabled())
    monkeypatch.setattr(torch, "_addmm_activation", product_with_gelu)
    for name in ("kernels_for", "products_for"):
        for module in (fused, attention, wan_attention):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda x: None if torch.is_grad_enabled() else found)
    for module in (patches, unet, video_unet):
        monkeypatch.setattr(module, "channels_last", lambda x: x.contiguous(memory_format=torch.channels_last))
    return found
