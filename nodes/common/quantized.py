"""Weights stored in 8 or 4 bits with scale factors, for ComfyUI's own quantised layers.

Supports the layouts that ComfyUI releases write or read: a marker on each layer (`comfy_quant`), the same in the
file's header (`_quantization_metadata`), and the older one for whole files (`scaled_fp8`, `scale_weight`), which Kijai
also uses.
"""
from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import comfy.quant_ops
import comfy.supported_models_base
import torch

from .values import flag, parse_json, shown, whole

INSTEAD = ("Use the bf16 or fp16 file of the same model, with fp8_e4m3fn under weight_dtype to save memory; newer "
           "releases of ComfyUI read more formats.")
OLD_NAMES = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
GROUPS = (1, 4, 16, 64, 256, 1024)  # number of columns rotated together: powers of 4
# Suffixes of entries that other packages add to packed weights.
STRANGE = ("weight_packed", "_extra_state", "_amax")


def _one(rows, columns):
    return (1,)


def _one_or_rows(rows, columns):
    return (1, rows)


def _columns(rows, columns):
    return (columns,)


def _blocks(rows, columns):
    """One scale per 16 values, in tiles of 128 x 4."""
    return (-(-rows // 128) * 128 * -(-columns // 64) * 4,)


class Format(NamedTuple):
    stored: torch.dtype
    packed: int                     # values per stored element
    scales: dict[str, Callable]     # name -> function of rows and columns: allowed element counts


FORMATS = {
    "float8_e4m3fn": Format(torch.float8_e4m3fn, 1, {"weight_scale": _one}),
    "float8_e5m2": Format(torch.float8_e5m2, 1, {"weight_scale": _one}),
    "nvfp4": Format(torch.uint8, 2, {"weight_scale": _blocks, "weight_scale_2": _one}),
    "int8_tensorwise": Format(torch.int8, 1, {"weight_scale": _one_or_rows}),
}
# Optional entries of a layer: a scale for its 8-bit input, and one for each input column.
BESIDE = {"input_scale": _one, "pre_quant_scale": _columns}
# Parameter suffixes of quantised layers, other than weight and bias.
SCALES = tuple(f".{name}" for name in (*OLD_NAMES, *BESIDE))
EIGHT_BITS = {FORMATS[name].stored: name for name in ("float8_e4m3fn", "float8_e5m2")}


class Layer(NamedTuple):
    """A linear layer as stored in the file: format and settings, weight, scales by name."""

    settings: dict
    weight: torch.Tensor
    scales: dict[str, torch.Tensor]

    @property
    def shape(self):
        """Shape of the unpacked weight."""
        rows, columns = self.weight.shape
        return rows, columns * FORMATS[self.settings["format"]].packed


class Quantized(dict):
    """Name -> `Layer`. Empty for a file without quantised layers."""

    @property
    def device(self):
        """Device on which to build the network: marked layers create their weight on loading and keep it there."""
        return "cpu" if _reads_marks() else "meta"

    def prepare(self, model_config):
        """Set in core's model configuration which layer class the network is built with."""
        if _reads_marks():
            model_config.quant_config = {"mixed_ops": True}
        else:
            model_config.scaled_fp8 = next(iter(self.values())).weight.dtype

    def state_dict(self, network):
        """The layers under the keys that `network`, built after `prepare`, expects."""
        found = {f"{name}.weight": layer.weight for name, layer in self.items()}
        if _reads_marks():
            for name, layer in self.items():
                found |= {f"{name}.{scale}": value for scale, value in layer.scales.items()}
                found[f"{name}.comfy_quant"] = torch.tensor(list(json.dumps(layer.settings).encode()),
                                                            dtype=torch.uint8)
            return found
        scaled = [key for key in network.state_dict() if key.endswith(".scale_weight")]
        return found | {key: self[name].scales["weight_scale"] if (name := key.removesuffix(".scale_weight")) in self
                        else torch.ones(()) for key in scaled}


def host_formats():
    """Formats supported by the layers of this ComfyUI."""
    if _reads_marks():
        known, layout = comfy.quant_ops.QUANT_ALGOS, comfy.quant_ops.get_layout_class
        return [name for name in FORMATS if name in known and layout(known[name]["comfy_tensor_layout"]) is not None]
    # Until 0.3.76 there is a single layer class, for files with one scale factor per 8-bit weight.
    return list(EIGHT_BITS.values()) if hasattr(comfy.supported_models_base.BASE, "scaled_fp8") else []


def _reads_marks():
    """Whether the layers of this ComfyUI support `comfy_quant`."""
    return hasattr(comfy.supported_models_base.BASE, "quant_config") and hasattr(comfy.quant_ops, "get_layout_class")


def take_quantized(tensors, metadata, rename, path):
    """Move the quantised layers out of `tensors`; returns them as `Quantized`.

    `rename` maps a key of the header to one of `tensors`. Raises ValueError for formats that this ComfyUI does not
    support and for layers with inconsistent parts.
    """
    settings = _marked(tensors, metadata, rename, path)
    whole_file = tensors.pop("scaled_fp8", None)
    for key in [key for key in tensors if key.rpartition(".")[2] in OLD_NAMES]:
        name, _, end = key.rpartition(".")
        tensors[f"{name}.{OLD_NAMES[end]}"] = tensors.pop(key)
    for key in [key for key in tensors if key.endswith(".weight_scale")]:
        name = key.removesuffix(".weight_scale")
        weight = tensors.get(f"{name}.weight")
        if name in settings or weight is None:
            continue
        if weight.dtype in EIGHT_BITS:
            settings[name] = {"format": EIGHT_BITS[weight.dtype]}
            if whole_file is not None and whole_file.numel() == 2:  # means: no 8-bit compute
                settings[name]["full_precision_matrix_mult"] = True
        elif weight.is_floating_point() and tensors[key].numel() == 1 and tensors[key].item() == 1:
            tensors.pop(key)  # from a layer that is not quantised
    _refuse_strange(tensors, settings, path)
    return Quantized({name: _layer(tensors, name, given, path) for name, given in settings.items()})


def _marked(tensors, metadata, rename, path):
    """Layer -> settings, from the header and from the markers, which are removed from `tensors`."""
    given = {}
    if "_quantization_metadata" in metadata:
        where = f"The entry _quantization_metadata in the header of {path}"
        layers = parse_json(metadata["_quantization_metadata"], where).get("layers")
        if not isinstance(layers, dict):
            raise ValueError(f"{where} has no entry layers, or it is not an object. {INSTEAD}")
        given = {rename(f"{name}.weight").removesuffix(".weight"): value for name, value in layers.items()}
    for key in [key for key in tensors if key.endswith(".comfy_quant")]:
        mark = tensors.pop(key)
        if mark.dtype != torch.uint8 or mark.ndim != 1:
            raise ValueError(f"{path}: {key} is {mark.dtype}, {list(mark.shape)}. It must be text as bytes (uint8). "
                             "The file is damaged. Get it again.")
        given[key.removesuffix(".comfy_quant")] = parse_json(bytes(mark.tolist()), f"{path}: {key}")
    return {name: _settings(value, f"{path}: the layer {name}") for name, value in given.items()}


def _settings(given, where):
    if not isinstance(given, dict):
        raise ValueError(f"{where} has the format {shown(given)}, which is not a JSON object. The file is damaged. Get "
                         "it again.")
    more = given.get("params")
    given = {**(more if isinstance(more, dict) else {}), **given}
    if given.get("format") not in host_formats():
        raise ValueError(f"{where} holds weights in the format {shown(given.get('format'))}, which this ComfyUI does "
                         f"not read. It reads {', '.join(host_formats()) or 'none'}. {INSTEAD}")
    settings = {"format": given["format"]}
    for name in ("full_precision_matrix_mult", "convrot"):
        if name in given:
            settings[name] = flag(given[name], f"{where}: {name}")
    if settings.get("convrot"):
        settings["convrot_groupsize"] = whole(given.get("convrot_groupsize", 256), f"{where}: convrot_groupsize")
    return settings


def _refuse_strange(tensors, settings, path):
    strange = [key for key, value in tensors.items() if key.endswith(STRANGE) or key.endswith(".weight_scale_2")
               and key.removesuffix(".weight_scale_2") not in settings or key.endswith("weight")
               and value.dtype in (torch.uint8, torch.int8) and key.removesuffix(".weight") not in settings]
    if strange:
        raise ValueError(f"{path} holds packed 4-bit weights (NVFP4, or another integer format; {strange[0]}) that do "
                         f"not say how they are packed. {INSTEAD}")


def _layer(tensors, name, settings, path):
    stored, packed, scales = FORMATS[settings["format"]]
    weight = tensors.pop(f"{name}.weight", None)
    if weight is None or weight.ndim != 2 or weight.dtype != stored:
        found = "is missing" if weight is None else f"is {list(weight.shape)}, {weight.dtype}"
        raise ValueError(f"{path}: {name} is marked as {settings['format']}, but its weight {found}. Two axes of "
                         f"{stored} are expected. The file was changed or saved in part. Get the complete file.")
    rows, columns = weight.shape
    group = settings.get("convrot_groupsize", 1)
    if group not in GROUPS or columns % group:
        raise ValueError(f"{path}: {name} has {columns} columns, which are not divisible into groups of {group} "
                         f"(convrot_groupsize). Allowed: {', '.join(map(str, GROUPS))}. The file is damaged. Get it "
                         "again.")
    taken = {}
    if not _reads_marks():
        tensors.pop(f"{name}.input_scale", None)  # that layer class does not compute in 8 bits
    for end, sizes in scales.items() | {pair for pair in BESIDE.items() if f"{name}.{pair[0]}" in tensors}:
        value, allowed = tensors.pop(f"{name}.{end}", None), sizes(rows, columns * packed)
        if value is None or value.numel() not in allowed or allowed == (1,) and not _is_scale(value):
            found = "is missing" if value is None else f"is {list(value.shape)}, {shown(value.flatten()[:1].tolist())}"
            raise ValueError(f"{path}: {name}.{end} {found}. Expected: {' or '.join(map(str, allowed))} scale factors "
                             f"above 0, as {settings['format']} has. {INSTEAD}")
        taken[end] = value.reshape(()).float() if allowed == (1,) else value
    return Layer(settings, weight, taken)


def _is_scale(value):
    return value.is_floating_point() and (value.is_meta or 0 < value.item() < float("inf"))
