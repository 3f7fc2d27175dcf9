"""Triton kernels of `fused.py` with matrix products: GEGLU after its linear layer, attention to few keys.

Layouts: M tokens, K channels in, O channels out; O videos, I frames or places of a video, R rows that attend, S keys, C
channels of all heads. Sums are in float32. Public functions take tensors on one GPU and give no gradient.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, CHANNELS = 128, 128  # tile of the gated linear layer
NEIGHBOURS = 8               # tiles of tokens that share the weights in the GPU's cache
LARGE = 160_000              # bytes of shared memory of a GPU made for computing
HALF = (torch.float16, torch.bfloat16)  # of `gated_linear`: matrix units round 32-bit numbers, unlike PyTorch
MOST_KEYS, MOST_CHANNELS = 128, 128  # of `attend`: what fits a tile; channels are those of a head


@triton.jit
def _gated_linear(x_ptr, weight_ptr, bias_ptr, out_ptr, tokens, width, channels, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NEAR: tl.constexpr):
    """One tile of value * GELU(gate); rows of the weight: those of the value, then those of the gate."""
    rows, columns = tl.cdiv(tokens, BLOCK_M), tl.cdiv(width, BLOCK_N)
    number = tl.program_id(0)
    first = number // (NEAR * columns) * NEAR
    near = tl.minimum(rows - first, NEAR)
    token = (first + number % (NEAR * columns) % near).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = number % (NEAR * columns) // near * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_K)
    present, known = token < tokens, column < width
    x_start = x_ptr + token[:, None] * channels + channel[None, :]
    value_start = weight_ptr + column[None, :] * channels + channel[:, None]
    gate_start = value_start + width * channels
    value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, channels, BLOCK_K):
        inside = channel < channels - start
        x = tl.load(x_start + start, present[:, None] & inside[None, :], 0.0)
        value = tl.dot(x, tl.load(value_start + start, inside[:, None] & known[None, :], 0.0), value)
        gate = tl.dot(x, tl.load(gate_start + start, inside[:, None] & known[None, :], 0.0), gate)
    value += tl.load(bias_ptr + column, known, 0.0).to(tl.float32)[None, :]
    gate += tl.load(bias_ptr + width + column, known, 0.0).to(tl.float32)[None, :]
    kind = out_ptr.dtype.element_ty  # PyTorch rounds the layer's result and that of GELU
    value, gate = value.to(kind).to(tl.float32), gate.to(kind).to(tl.float32)
    gate = (0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))).to(kind).to(tl.float32)
    tl.store(out_ptr + token[:, None] * width + column[None, :], (value * gate).to(kind),
             present[:, None] & known[None, :])


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y = x @ weight.T + bias for x [..., K]; the first half of y times GELU of the second: [..., O / 2]."""
    x, weight = x.contiguous(), weight.contiguous()
    channels, width = x.shape[-1], len(weight) // 2
    out = x.new_empty(*x.shape[:-1], width)
    tokens = out.numel() // width
    large = x.is_cuda and torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin >= LARGE
    _gated_linear[(triton.cdiv(tokens, TOKENS) * triton.cdiv(width, CHANNELS),)](
        x, weight, bias, out, tokens, width, channels, BLOCK_M=TOKENS, BLOCK_N=CHANNELS,
        BLOCK_K=64 if large else 32, NEAR=NEIGHBOURS, num_warps=8, num_stages=3)
    return out


@triton.jit
def _mixed(q, k_ptr, v_ptr, stride, keys, channels, scale, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """softmax(q k^T scale) v for a tile of queries and all keys of a head, rounded to the type of q."""
    key, channel = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    place = key[:, None] * stride + channel[None, :]
    inside = (key < keys)[:, None] & (channel < channels)[None, :]
    k = tl.load(k_ptr + place, inside, 0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where((key < keys)[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    weights = weights / tl.sum(weights, 1)[:, None]
    v = tl.load(v_ptr + place, inside, 0.0)
    return tl.dot(weights.to(v.dtype), v, input_precision="ieee").to(q.dtype)


@triton.jit
def _attend(q_ptr, out_ptr, k_ptr, v_ptr, more_k_ptr, more_v_ptr, inner, rows, heads, channels, scale, q_outer,
            q_inner, q_row, out_outer, out_inner, out_row, outer_stride, inner_stride, key_stride, keys, more_outer,
            more_inner, more_stride, more_keys, MORE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
            BLOCK_MORE: tl.constexpr, BLOCK_D: tl.constexpr):
    number = tl.program_id(0)
    start = number % heads * channels
    number = number // heads
    blocks = tl.cdiv(rows, BLOCK_R)
    row = (number % blocks * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    number = number // blocks
    one, other = (number // inner).to(tl.int64), (number % inner).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    q = tl.load(q_ptr + one * q_outer + other * q_inner + start + row[:, None] * q_row + channel[None, :], inside, 0.0)
    place = one * outer_stride + other * inner_stride + start
    y = _mixed(q, k_ptr + place, v_ptr + place, key_stride, keys, channels, scale, BLOCK_S, BLOCK_D)
    if MORE:
        place = one * more_outer + other * more_inner + start
        y += _mixed(q, more_k_ptr + place, more_v_ptr + place, more_stride, more_keys, channels, scale, BLOCK_MORE,
                    BLOCK_D)
    tl.store(out_ptr + one * out_outer + other * out_inner + start + row[:, None] * out_row + channel[None, :], y,
             inside)


def attend(q_OIRC: Tensor, out_OIRC: Tensor, sources: list[tuple[Tensor, Tensor]], heads: int) -> None:
    """Attention of every row to one or two sources of few keys, the results added; written to `out`.

    sources: keys and values [O, I, S, C], at most `MOST_KEYS` each. Keys and values of a source have the same strides;
    all channels lie side by side; everything else may be a view, such as one of an expanded tensor.
    """
    outer, inner, rows, width = q_OIRC.shape
    channels = width // heads
    (k, v), (more_k, more_v) = sources[0], sources[-1]

    def tile(size):
        return max(16, triton.next_power_of_2(size))

    block = min(128, tile(rows))
    _attend[(heads * triton.cdiv(rows, block) * outer * inner,)](
        q_OIRC, out_OIRC, k, v, more_k, more_v, inner, rows, heads, channels, channels ** -0.5, *q_OIRC.stride()[:3],
        *out_OIRC.stride()[:3], *k.stride()[:3], k.shape[2], *more_k.stride()[:3], more_k.shape[2],
        MORE=len(sources) == 2, BLOCK_R=block, BLOCK_S=tile(k.shape[2]), BLOCK_MORE=tile(more_k.shape[2]),
        BLOCK_D=tile(channels), num_warps=4 if block > 32 else 1)
