"""Loads a causal Wan 2.1 checkpoint as MODEL and checks that every key is used.

Type and size are inferred from keys and shapes, the number of heads from the width or the header. The weights do not
reveal whether they were trained causally: keys and shapes are the same as for Wan 2.1.
"""
from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import NamedTuple

import comfy.model_management
import comfy.ops
import comfy.utils
import torch

from ..common.core_model import check_weight_dtype, make_patcher, storage_dtype
from ..common.files import check_keys, check_kinds, take_prefix
from ..common.quantized import Quantized, take_quantized
from ..common.values import DEEPEST, flag, number, parse_json, shown, whole
from .base import make_model
from .foreign import check_family
from .keys import BESIDE, EMA, RAW, native_key
from .model import PATCH, CausalWan, WanParams

log = logging.getLogger(__name__)

WEIGHTS = ("auto", "ema", "raw")

CAUSAL_NAMES = re.compile(r"causal|causvid|self[-_ ]?forcing|longlive|autoregressive|(?<![a-z])ar(?![a-z])"
                          r"|krea[-_ ]?realtime|memflow|(?:reward|one)[-_ ]?forcing|raven|streamdiffusion")
HEAD_WIDTH = 128  # of every published Wan 2.1
# Keys from which the sizes are inferred, with their number of axes.
SIZED = {"patch_embedding.weight": 5, "head.head.weight": 2, "blocks.0.ffn.0.weight": 2, "text_embedding.0.weight": 2,
         "time_embedding.0.weight": 2}
SIZED_IMAGE = {"img_emb.proj.1.weight": 2}


class Header(NamedTuple):
    """The `config` entry of a file's header; heads None: computed from the width; encoders: those of a demo that the
    model was trained with."""

    heads: int | None
    scale_factor: float
    causal: bool
    encoders: str | None


def load(checkpoint, weights="auto", weight_dtype="auto", causal=True):
    """Turn a `files.Checkpoint` into ComfyUI's MODEL; `checkpoint.tensors` is emptied.

    `weights` chooses between the trained and the averaged weights of an original .pt file, `weight_dtype` is one of
    `WEIGHT_DTYPES`. `causal` False: a bidirectional model is wanted. Raises ValueError for another model family or
    variant, for a key that is missing, unknown or of the wrong shape, and for unknown options.
    """
    check_weight_dtype(weight_dtype)
    path = checkpoint.path
    header = read_header(checkpoint.metadata, path)
    if causal:
        _say_if_not_causal(checkpoint, header)
    elif header.causal:
        raise ValueError(f"{path} is causal, by its header: it sees the frames before a block, not the whole video. "
                         "Give a bidirectional Wan.")
    tensors = pick(checkpoint, weights)
    check_family(path, tensors)
    quantized = take_quantized(tensors, checkpoint.metadata, native_key, path)
    if quantized and weight_dtype != "auto":
        raise ValueError(f"{path} holds {len(quantized)} layers in 8 or 4 bits with scale factors, which stay as they "
                         f"are. Choose auto under weight_dtype, not {weight_dtype}.")
    check_kinds(path, tensors)
    params = detect(tensors, header.heads, path, quantized)
    expected = expected_shapes(params)
    _check(tensors, quantized, dict(expected))
    model = make_model(params, header.scale_factor, storage_dtype(weight_dtype, tensors, quantized), quantized)
    model.encoders_of = header.encoders
    network = model.diffusion_model
    log.info("%s: causal Wan %s, %d layers, %d wide, %d heads; %d of %d keys found, none left over%s.", path,
             "image to video" if params.i2v else "text to video", params.num_layers, params.dim, params.num_heads,
             len(expected), len(expected), f", {len(quantized)} in 8 or 4 bits" if quantized else "")
    found = {key: _cast(tensors.pop(key), network.dtype) for key in list(tensors)}
    network.load_state_dict(found | quantized.state_dict(network), assign=True)
    return make_patcher(model)


def expected_shapes(params):
    """Key -> shape of the network's weights."""
    with torch.device("meta"):
        network = CausalWan(params, comfy.ops.disable_weight_init, None)
    return {key: value.shape for key, value in network.state_dict().items()}


def _check(tensors, quantized, expected):
    """Check that every key is expected and present; quantised layers by their unpacked shapes."""
    shapes = {f"{name}.weight": layer for name, layer in quantized.items()}
    found = tensors | {key: torch.empty(layer.shape, device="meta") for key, layer in shapes.items()}
    check_keys("network", found, expected,
               "Missing keys: the file was pruned or saved in part. Get the complete file. Unknown keys or other "
               "shapes: an extension or another model was merged into it. Use the original file.")


def read_header(metadata, path):
    """The `Header` of a .safetensors file: {"num_heads": 4, "scale_factor": 0.18, "encoders": "demo",
    "transformer": {"causal_ar": true}}.

    All entries are optional. Core uses the last one to mark causal files.
    """
    place = f"The entry config in the header of {path}"
    config = parse_json(metadata.get("config", "{}"), place)
    transformer = config.get("transformer", {})
    if not isinstance(transformer, dict):
        raise ValueError(f"{place} has {shown(transformer)} as transformer, which is not a JSON object. Correct it, or "
                         "remove it: published models need none.")
    heads = config.get("num_heads", transformer.get("num_heads"))
    if heads is not None:
        whole(heads, f"num_heads in the header of {path}", high=1024)
    encoders = config.get("encoders")
    if not isinstance(encoders, str | None):
        raise ValueError(f"encoders in the header of {path} is {shown(encoders)}: give the name of a demo of Load "
                         "DynamiCrafter, or remove it.")
    return Header(heads, number(config.get("scale_factor", 0.18215), f"scale_factor in the header of {path}", 0, 1000),
                  flag(transformer.get("causal_ar", False), f"causal_ar in the header of {path}"), encoders)


def pick(checkpoint, weights="auto"):
    """The selected weights by native key; `checkpoint.tensors` is emptied.

    "raw" is `generator` (or a file with one set of weights), "ema" is `generator_ema`, "auto" is what the authors use.
    Raises ValueError for a set that the file does not contain and for duplicate names.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}. Choose one of {', '.join(WEIGHTS)}.")
    path, tensors = checkpoint.path, checkpoint.tensors
    sets = {"raw": take_prefix(tensors, RAW), "ema": take_prefix(tensors, EMA)}
    if not any(sets.values()):
        beside = [key for key in tensors if key.startswith(BESIDE)]
        sets["raw"] = {key: value for key, value in tensors.items() if key not in beside}
        _leave_aside(path, beside)
    else:
        _leave_aside(path, list(tensors))
    tensors.clear()
    held = [name for name, found in sets.items() if found] or ["raw"]
    if weights == "auto":
        weights = published_choice(path) if len(held) == 2 else held[0]
        log.info("%s holds %s weights; using %s.", path, " and ".join(held), weights)
        if len(held) == 2 and re.search("causal[-_ ]?forcing", path.lower()) and "wise" not in path.lower():
            log.warning("%s does not say whether it is frame-wise (ema) or chunk-wise Causal-Forcing (raw). Choose raw "
                        "for chunk-wise, or put the file into a folder of that name.", path)
    if weights not in held:
        raise ValueError(f"{path} holds no {weights} weights, only {held[0]}. Choose {held[0]}, or auto.")
    named = {native_key(key): value for key, value in sets[weights].items()}
    if len(named) < len(sets[weights]):
        raise ValueError(f"{path}: {len(sets[weights]) - len(named)} keys name the same weights twice, with and "
                         "without a wrapper's prefix. Save the state dict of the network alone.")
    return named


def published_choice(path):
    """Which set the authors use for a file with both: "ema", except "raw" for chunk-wise Causal Forcing.

    That model cannot be recognised by its keys, only by the folder it is published in, `chunkwise`. The long-video
    model of the same authors uses "ema".
    """
    place = "/".join(Path(path).parts[-3:]).lower()
    return "raw" if re.search("chunk[-_ ]?wise", place) and "long" not in place else "ema"


def detect(tensors, heads, path, quantized=Quantized()):
    """`WanParams` from native keys and shapes. `heads`: number of heads, None for dim / 128.

    Raises ValueError for sizes that cannot be inferred or built, and for inputs that a causal text-to-video or
    image-to-video Wan does not have.
    """
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    shapes |= {f"{name}.weight": layer.shape for name, layer in quantized.items()}
    image = any(key.startswith("img_emb.") or ".cross_attn.k_img." in key for key in shapes)
    for key, axes in (SIZED | SIZED_IMAGE if image else SIZED).items():
        if len(shapes.get(key, ())) != axes:
            found = f"is {list(shapes[key])}" if key in shapes else "is missing"
            raise ValueError(f"{path}: the size of the network cannot be read, {key} {found}. The file was pruned, "
                             "changed or saved in part. Get the complete file.")
        for size in shapes[key]:
            whole(size, f"{path}: an axis of {key}")
    dim, in_dim = shapes["patch_embedding.weight"][:2]
    if heads is None and dim % HEAD_WIDTH:
        raise ValueError(f"{path}: the network is {dim} wide, which is no multiple of {HEAD_WIDTH}, so the number of "
                         'heads is unknown. Set it in the header of a .safetensors file: config {"num_heads": N}. Core '
                         "does not write it when it saves a model.")
    params = WanParams(
        in_dim=in_dim, out_dim=shapes["head.head.weight"][0] // math.prod(PATCH), dim=dim,
        ffn_dim=shapes["blocks.0.ffn.0.weight"][0], num_heads=heads or dim // HEAD_WIDTH,
        num_layers=_count_layers(shapes, path), text_dim=shapes["text_embedding.0.weight"][1],
        freq_dim=shapes["time_embedding.0.weight"][1], i2v=image,
        clip_dim=shapes["img_emb.proj.1.weight"][0] if image else 0)
    _check_channels(params, path)
    return params


def _count_layers(keys, path):
    """Layers must be numbered from 0 without gaps, so no file can request a network larger than itself."""
    found = {match[1] for match in map(re.compile(r"blocks\.([^.]*)\.").match, keys) if match}
    numbers = {str(index) for index in range(min(len(found), DEEPEST))}
    if found != numbers:
        raise ValueError(f"{path}: layers are numbered from 0 without a gap, {DEEPEST} at most. The file has "
                         f"{len(found)}, among them blocks.{min(found - numbers, key=len)[:20]}. It was changed, or "
                         "saved in part. Get the complete file.")
    return len(found)


def _check_channels(params, path):
    """Identify the Wan variant by channels, width and image keys; only text and image to video are accepted."""
    taken, given, image = params.in_dim, params.out_dim, params.i2v
    use = ("Use a causal Wan 2.1 (Self-Forcing, Causal-Forcing, LongLive 1.0), or core's Load Diffusion Model for "
           "this file.")
    if taken == given == 48:
        raise ValueError(f"{path} is Wan2.2 TI2V-5B or a model made from it, LongLive 2.0 ({params.dim} wide, 48 "
                         f"channels): its latents (Wan 2.2 VAE) and its blocks are different. {use}")
    if taken == 48 and given == 16:
        raise ValueError(f"{path} is Wan Fun-Control (48 channels in, 16 out): it needs a control video, which the "
                         f"block-autoregressive sampler does not have. {use}")
    if taken == 2 * given + 4 and not image:
        raise ValueError(f"{path} takes {taken} channels and has no image tokens (img_emb), like Wan2.2 I2V-A14B: one "
                         f"of a pair of bidirectional experts. {use}")
    if taken != (2 * given + 4 if image else given) or given not in (4, 16):
        raise ValueError(f"{path}: {taken} channels in, {given} out, {'with' if image else 'without'} image tokens, "
                         "fits no known Wan. Text to video has the same number in and out, image to video 2 x out + 4 "
                         f"and img_emb; out is 16 (Wan 2.1) or 4 (small models on Stable Diffusion's latents). {use}")


def _leave_aside(path, keys):
    """Log which other parts of the file (critic, optimizer, VAE) are ignored."""
    if keys:
        parts = sorted({key.partition(".")[0] for key in keys})
        log.info("%s: ignored %d tensors outside the network: %s.", path, len(keys), ", ".join(parts))


def _say_if_not_causal(checkpoint, header):
    named = CAUSAL_NAMES.search("/".join(Path(checkpoint.path).parts[-2:]).lower())
    if not (header.causal or named or any(key.startswith((RAW, EMA)) for key in checkpoint.tensors)):
        log.warning("%s does not say that it is causal, neither in its header nor in its name. Bidirectional Wan has "
                    "the same keys and loads too, but its videos fall apart from block to block. Use a causal model. "
                    "If it is one, put the word causal into its name.", checkpoint.path)


def _cast(value, dtype):
    """Cast to the storage dtype; for 8 bits only matrices, because the rest is small and would lose most precision."""
    if dtype.itemsize == 1 and value.ndim != 2:
        dtype = torch.bfloat16
    return value.to(dtype)
