"""Hooks for ComfyUI nodes that patch a U-Net: the same places, order and arguments as in ComfyUI's own U-Net.

`options["patches"]` lists functions by place. `options["patches_replace"]` holds functions that replace an attention,
by block, ("input", "middle" or "output", number), or by block and index of the transformer in it. Frames are folded
into the batch, so functions written for images see images. Temporal attention cannot be patched.

Tensor names end in their layout: N frames, C channels, H height, W width, L tokens of a frame, M attended tokens.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .fused import project


def channels_last(x_NCHW: Tensor) -> Tensor:
    """The memory layout of the U-Nets' activations on a GPU, in which an image and its tokens are views of each other.
    PyTorch's group norm for CPUs is several times slower in it."""
    return x_NCHW if x_NCHW.is_cpu else x_NCHW.contiguous(memory_format=torch.channels_last)


def open_options(options: dict, h_NCHW: Tensor) -> dict:
    """Copy `options` for one forward pass and add the entries that patch functions read."""
    return {**options, "original_shape": list(h_NCHW.shape), "transformer_index": 0, "block_index": 0}


def patch_hidden(place: str, h_NCHW: Tensor, options: dict) -> Tensor:
    """Apply the functions at `place` to the hidden states: "input_block_patch" or "input_block_patch_after_skip"."""
    for function in _functions(place, options):
        h_NCHW = channels_last(function(h_NCHW, options))
    return h_NCHW


def join_skip(h_NCHW: Tensor, skip_NCHW: Tensor, options: dict) -> Tensor:
    """Input of an output block: hidden states and skip concatenated, [N, C of both, H, W]."""
    for function in _functions("output_block_patch", options):
        h_NCHW, skip_NCHW = function(h_NCHW, skip_NCHW, options)
    return channels_last(torch.cat((h_NCHW, skip_NCHW), dim=1))


def has_functions(place: str, options: dict) -> bool:
    return bool(_functions(place, options))


def patch_tokens(place: str, x_NLC: Tensor, layer, options: dict) -> Tensor:
    """Apply the functions at `place` to the tokens: "attn1_output_patch", "middle_patch" or "attn2_output_patch"."""
    for function in _functions(place, options):
        x_NLC = function(x_NLC, _told(layer, options))
    return x_NLC


def is_patched(name: str, options: dict) -> bool:
    """Whether attention `name` of this block is patched: "attn1" (within the frame) or "attn2" (to the text)."""
    return bool(_functions(f"{name}_patch", options)) or _replacement(name, options) is not None


def patch_inputs(name: str, x_NLC: Tensor, context_NMC: Tensor, layer, options: dict) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs of the query, key and value projections of attention `name`."""
    value_NMC = context_NMC
    for function in _functions(f"{name}_patch", options):
        x_NLC, context_NMC, value_NMC = function(x_NLC, context_NMC, value_NMC, _told(layer, options))
    return x_NLC, context_NMC, value_NMC


def mix(name: str, q_NLC: Tensor, k_NMC: Tensor, v_NMC: Tensor, layer, options: dict) -> Tensor:
    """Attention `name` of `layer`, or the function that replaces it, before the output projection."""
    function = _replacement(name, options)
    if function is not None:
        return function(q_NLC, k_NMC, v_NMC, _told(layer, options))
    return layer.attention(q_NLC, k_NMC, v_NMC, layer.heads, transformer_options=options)


def attend_frame(x_NLC: Tensor, layer, options: dict) -> Tensor:
    """Self-attention of `layer` within the frame, with all patches."""
    queries, keys, values = patch_inputs("attn1", x_NLC, x_NLC, layer, options)
    if queries is keys is values:
        q_NLC, k_NLC, v_NLC = project(x_NLC, (layer.to_q, layer.to_k, layer.to_v))
    else:
        q_NLC, k_NLC, v_NLC = layer.to_q(queries), layer.to_k(keys), layer.to_v(values)
    mixed = mix("attn1", q_NLC, k_NLC, v_NLC, layer, options)
    return patch_tokens("attn1_output_patch", layer.to_out(mixed), layer, options)


def _functions(place: str, options: dict) -> list[Callable]:
    return options.get("patches", {}).get(place, [])


def _replacement(name: str, options: dict) -> Callable | None:
    functions = options.get("patches_replace", {}).get(name)
    if not functions:
        return None
    return functions.get((*options["block"], options["block_index"]), functions.get(options["block"]))


def _told(layer, options: dict) -> dict:
    """Options passed to patch functions: all but the functions themselves, plus the attention's sizes."""
    rest = {key: value for key, value in options.items() if key not in ("patches", "patches_replace")}
    return {**rest, "n_heads": layer.heads, "dim_head": layer.to_q.out_features // layer.heads, "attn_precision": None}
