"""Triton kernels of `fused.py`: each reads and writes memory once where PyTorch needs several operations.

They compute in float32 and round where PyTorch's operations round, so that both give the same numbers. Layouts: B
videos, F frames of a video, L tokens, C channels, P channel pairs of a head, N what is normalised as a whole. Public
functions take tensors on one GPU and give no gradient.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, CHANNELS = 32, 64  # tile of the group norm
CHUNKS = 128             # at most so many partial moments of a group


@triton.jit
def _add_norm(x_ptr, branch_ptr, gate_ptr, scale_ptr, shift_ptr, sum_ptr, out_ptr, tokens, frame_tokens, frames,
              gate_stride, scale_stride, shift_stride, channels, eps, BRANCH: tl.constexpr, GATE: tl.constexpr,
              FRAMES: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    frame = (row // tokens) * frames + (row % tokens) // frame_tokens
    column = tl.arange(0, BLOCK)
    inside = column < channels
    kind = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * channels + column, inside, 0.0).to(tl.float32)
    if BRANCH:
        branch = tl.load(branch_ptr + row * channels + column, inside, 0.0).to(tl.float32)
        if GATE:
            branch *= tl.load(gate_ptr + frame * gate_stride + column, inside, 0.0).to(tl.float32)
        x = (x + branch).to(kind)
        tl.store(sum_ptr + row * channels + column, x, inside)
        x = x.to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x) / channels, 0.0)
    y = centred / tl.sqrt(tl.sum(centred * centred) / channels + eps)
    if WEIGHTS:
        scale = tl.load(scale_ptr + frame * scale_stride + column, inside, 0.0).to(tl.float32)
        shift = tl.load(shift_ptr + frame * shift_stride + column, inside, 0.0).to(tl.float32)
        if FRAMES:  # PyTorch rounds the norm and 1 + scale
            y, scale = y.to(kind).to(tl.float32), (1 + scale).to(kind).to(tl.float32)
        y = y * scale + shift
    tl.store(out_ptr + row * channels + column, y.to(kind), inside)


def add_norm(x_BLC: Tensor, branch_BLC: Tensor | None, gate_BFC: Tensor | None, scale: Tensor | None,
             shift: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y = x + gate * branch, and its layer norm: norm(y) * scale + shift with the norm's own weights [C], or
    norm(y) * (1 + scale) + shift with those of each frame [B, F, C]."""
    batch, tokens, channels = x_BLC.shape
    by_frame = scale is not None and scale.ndim == 3
    frames = next((len(given[0]) for given in (gate_BFC, scale) if given is not None and given.ndim == 3), 1)
    x_BLC = x_BLC.contiguous()
    total, out = (torch.empty_like(x_BLC) if branch_BLC is not None else x_BLC), torch.empty_like(x_BLC)
    block = triton.next_power_of_2(channels)

    def stride(given):
        return given.stride(1) if given is not None and given.ndim == 3 else 0

    _add_norm[(batch * tokens,)](
        x_BLC, x_BLC if branch_BLC is None else branch_BLC.contiguous(), x_BLC if gate_BFC is None else gate_BFC,
        x_BLC if scale is None else scale, x_BLC if shift is None else shift, total, out, tokens, tokens // frames,
        frames, stride(gate_BFC), stride(scale), stride(shift), channels, eps, BRANCH=branch_BLC is not None,
        GATE=gate_BFC is not None, FRAMES=by_frame, WEIGHTS=scale is not None, BLOCK=block,
        num_warps=max(1, min(8, block // 256)))
    return total, out


@triton.jit
def _norm_rotate(x_ptr, weight_ptr, rotation_ptr, slots_ptr, out_ptr, tokens, frame_tokens, out_tokens, channels,
                 head_pairs, eps, RING: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = row % tokens
    pair = tl.arange(0, BLOCK)
    inside = pair < channels // 2
    kind = out_ptr.dtype.element_ty
    start = x_ptr + row * channels + 2 * pair
    real, imaginary = tl.load(start, inside, 0.0).to(tl.float32), tl.load(start + 1, inside, 0.0).to(tl.float32)
    factor = 1 / tl.sqrt(tl.sum(real * real + imaginary * imaginary) / channels + eps)
    weight = weight_ptr + 2 * pair
    real = (real * factor * tl.load(weight, inside, 0.0).to(tl.float32)).to(kind).to(tl.float32)
    imaginary = (imaginary * factor * tl.load(weight + 1, inside, 0.0).to(tl.float32)).to(kind).to(tl.float32)
    turn = rotation_ptr + 2 * (token * head_pairs + pair % head_pairs)
    cos, sin = tl.load(turn, inside, 0.0), tl.load(turn + 1, inside, 0.0)
    if RING:
        slot = tl.load(slots_ptr + token // frame_tokens)
        row = (row // tokens) * out_tokens + slot * frame_tokens + token % frame_tokens
    out = out_ptr + row * channels + 2 * pair
    tl.store(out, (real * cos - imaginary * sin).to(kind), inside)
    tl.store(out + 1, (real * sin + imaginary * cos).to(kind), inside)


def norm_rotate(x_BLC: Tensor, weight_C: Tensor, eps: float, rotation_LP2: Tensor, heads: int,
                ring_BKC: Tensor | None, slots_F: Tensor | None) -> Tensor:
    """RMS norm, then rotation of the pairs of channels; written to the frames `slots_F` of a ring if one is given.

    The ring may be the first tokens of a longer one.
    """
    batch, tokens, channels = x_BLC.shape
    x_BLC = x_BLC.contiguous()
    out = torch.empty_like(x_BLC) if ring_BKC is None else ring_BKC
    block = triton.next_power_of_2(channels // 2)
    _norm_rotate[(batch * tokens,)](
        x_BLC, weight_C, rotation_LP2, x_BLC if slots_F is None else slots_F, out, tokens,
        tokens if slots_F is None else tokens // len(slots_F), out.stride(0) // channels, channels,
        channels // heads // 2, eps, RING=ring_BKC is not None, BLOCK=block, num_warps=max(1, min(8, block // 128)))
    return out


@triton.jit
def _gated_gelu(x_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    kind = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + 2 * row * width + column, inside, 0.0).to(tl.float32)
    gate = tl.load(x_ptr + 2 * row * width + width + column, inside, 0.0).to(tl.float32)
    gate = (0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))).to(kind).to(tl.float32)
    tl.store(out_ptr + row * width + column, (x * gate).to(kind), inside)


def gated_gelu(x: Tensor) -> Tensor:
    """The first half of the last axis times GELU of the second."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    block = min(1024, triton.next_power_of_2(width))
    _gated_gelu[(out.numel() // width, triton.cdiv(width, block))](x, out, width, BLOCK=block)
    return out


@triton.jit
def _sum(x_ptr, branch_ptr, bias, place, inside, BRANCH: tl.constexpr):
    """x, or x + (branch + bias) rounded as PyTorch does, in float32."""
    x = tl.load(x_ptr + place, inside, 0.0).to(tl.float32)
    if BRANCH:
        branch = tl.load(branch_ptr + place, inside, 0.0).to(tl.float32) + bias
        x = (x + branch.to(x_ptr.dtype.element_ty).to(tl.float32)).to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _add_bias(x_ptr, branch_ptr, bias_ptr, out_ptr, elements, channels, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    bias = tl.load(bias_ptr + place % channels, inside, 0.0).to(tl.float32)
    y = _sum(x_ptr, branch_ptr, bias, place, inside, True)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), inside)


def add_bias(x: Tensor, branch: Tensor, bias_C: Tensor) -> Tensor:
    """x + (branch + bias) for tensors [N, C, ...] in channels-last memory; in the same layout."""
    out = torch.empty_like(x)
    _add_bias[(triton.cdiv(x.numel(), 1024),)](x, branch, bias_C, out, x.numel(), x.shape[1], BLOCK=1024)
    return out


@triton.jit
def _moments(x_ptr, branch_ptr, bias_ptr, sum_ptr, moments_ptr, positions, channels, chunk, chunks,
             BRANCH: tl.constexpr, BIAS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and sum of squared deviations of every channel over `chunk` positions; with a branch of x + branch + bias,
    which is stored."""
    whole, part = tl.program_id(0).to(tl.int64) // chunks, tl.program_id(0) % chunks
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = column < channels
    first = part * chunk
    last = tl.minimum(first + chunk, positions)
    base = whole * positions * channels + column
    bias = tl.zeros((BLOCK_C,), tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + column, known, 0.0).to(tl.float32)
    # Sums of differences from the first value lose no digits where the mean is large.
    origin = _sum(x_ptr, branch_ptr, bias, base + first * channels, known, BRANCH)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = (row < last)[:, None] & known[None, :]
        place = base[None, :] + row[:, None] * channels
        x = _sum(x_ptr, branch_ptr, bias[None, :], place, inside, BRANCH)
        if BRANCH:
            tl.store(sum_ptr + place, x.to(sum_ptr.dtype.element_ty), inside)
        x = tl.where(inside, x - origin[None, :], 0.0)
        total += x
        squares += x * x
    count = (last - first).to(tl.float32)
    mean, squares_C = tl.sum(total, 0) / count, tl.sum(squares, 0)
    out = moments_ptr + 2 * ((whole * chunks + part) * channels + column)
    tl.store(out, origin + mean, known)
    tl.store(out + 1, squares_C - count * mean * mean, known)


@triton.jit
def _factors(moments_ptr, weight_ptr, add_ptr, factors_ptr, positions, channels, chunk, chunks, width, add_stride, eps,
             ADD: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Scale and centre of every channel of one group, from the moments of its parts (Chan's formula)."""
    whole, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, member = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_C)
    known = member < width
    column = group * width + member
    inside = (part < chunks)[:, None] & known[None, :]
    start = moments_ptr + 2 * ((whole * chunks + part[:, None]) * channels + column[None, :])
    added = tl.zeros((BLOCK_C,), tl.float32)
    if ADD:
        added = tl.load(add_ptr + whole * add_stride + column, known, 0.0).to(tl.float32)
    means = tl.load(start, inside, 0.0) + added[None, :]
    counts = tl.where(inside, tl.minimum(chunk, positions - part * chunk)[:, None], 0).to(tl.float32)
    amount = width * positions
    mean = tl.sum(tl.sum(counts * means, 1), 0) / amount
    squares = tl.load(start + 1, inside, 0.0) + counts * (means - mean) * (means - mean)
    factor = 1 / tl.sqrt(tl.sum(tl.sum(squares, 1), 0) / amount + eps)
    scale = factor * tl.load(weight_ptr + column, known, 0.0).to(tl.float32)
    tl.store(factors_ptr + 2 * (whole * channels + column), scale, known)
    tl.store(factors_ptr + 2 * (whole * channels + column) + 1, mean - added, known)


@triton.jit
def _apply(x_ptr, factors_ptr, bias_ptr, out_ptr, positions, channels, blocks, SILU: tl.constexpr,
           BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    whole, part = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = part * BLOCK_R + tl.arange(0, BLOCK_R)
    known = column < channels
    inside = (row < positions)[:, None] & known[None, :]
    place = (whole * positions + row[:, None]) * channels + column[None, :]
    scale = tl.load(factors_ptr + 2 * (whole * channels + column), known, 0.0)
    centre = tl.load(factors_ptr + 2 * (whole * channels + column) + 1, known, 0.0)
    bias = tl.load(bias_ptr + column, known, 0.0).to(tl.float32)
    kind = out_ptr.dtype.element_ty
    y = (tl.load(x_ptr + place, inside, 0.0).to(tl.float32) - centre[None, :]) * scale[None, :] + bias[None, :]
    if SILU:
        y = y.to(kind).to(tl.float32)
        y = y * tl.sigmoid(y)
    tl.store(out_ptr + place, y.to(kind), inside)


def group_norm(x: Tensor, groups: int, weight_C: Tensor, bias_C: Tensor, eps: float, add: Tensor | None,
               silu: bool) -> Tensor:
    """Group norm of x + add for x [N, C, ...] in channels-last memory, then SiLU if asked for; in the same layout.
    add: [N, C] or [C]."""
    return _group_norm(x, None, add, groups, weight_C, bias_C, eps, silu)[1]


def add_group_norm(x: Tensor, branch: Tensor, add_C: Tensor | None, groups: int, weight_C: Tensor, bias_C: Tensor,
                   eps: float) -> tuple[Tensor, Tensor]:
    """y = x + (branch + add), and SiLU of its group norm; all in channels-last memory."""
    return _group_norm(x, branch, add_C, groups, weight_C, bias_C, eps, True)


def _group_norm(x, branch, add, groups, weight_C, bias_C, eps, silu):
    whole, channels = x.shape[:2]
    positions = x[0, 0].numel()
    width, chunks = channels // groups, min(CHUNKS, triton.cdiv(positions, 8 * ROWS))
    chunk = triton.cdiv(positions, chunks)
    chunks = triton.cdiv(positions, chunk)
    moments = torch.empty(whole * chunks * channels * 2, dtype=torch.float32, device=x.device)
    factors = torch.empty(whole * channels * 2, dtype=torch.float32, device=x.device)
    columns, blocks = triton.cdiv(channels, CHANNELS), triton.cdiv(positions, ROWS)
    joined, given = branch is not None, add is not None
    total, out, add = torch.empty_like(x) if joined else x, torch.empty_like(x), add.contiguous() if given else x
    _moments[(whole * chunks, columns)](
        x, branch if joined else x, add, total, moments, positions, channels, chunk, chunks, BRANCH=joined,
        BIAS=joined and given, BLOCK_R=ROWS, BLOCK_C=CHANNELS)
    _factors[(whole, groups)](
        moments, weight_C, add, factors, positions, channels, chunk, chunks, width,
        channels if add.ndim == 2 else 0, eps, ADD=given and not joined, BLOCK_K=triton.next_power_of_2(chunks),
        BLOCK_C=triton.next_power_of_2(width))
    _apply[(whole * blocks, columns)](total, factors, bias_C, out, positions, channels, blocks, SILU=silu, BLOCK_R=ROWS,
                                      BLOCK_C=CHANNELS)
    return total, out
