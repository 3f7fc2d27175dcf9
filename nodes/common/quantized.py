"""Weights that lie in a file in 8 or 4 bits with scale factors, for the host's own layers that compute with them.

Known are the layouts that ComfyUI's releases write or read: a mark on every layer (`comfy_quant`), the same in the
file's header (`_quantization_metadata`), and the older one of whole files (`scaled_fp8`, `scale_weight`), which is also
Kijai's.
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
GROUPS = (1, 4, 16, 64, 256, 1024)  # columns that are rotated together: powers of 4
# Ends of the names of what other packages than ComfyUI put beside packed weights.
STRANGE = ("weight_packed", "_extra_state", "_amax")


def _one(rows, columns):
    return (1,)


def _one_or_rows(rows, columns):
    return (1, rows)


def _columns(rows, columns):
    return (columns,)


def _blocks(rows, columns):
    """One scale for 16 numbers, in tiles of 128 x 4."""
    return (-(-rows // 128) * 128 * -(-columns // 64) * 4,)


class Format(NamedTuple):
    stored: torch.dtype
    packed: int                     # numbers in a stored element
    scales: dict[str, Callable]     # name -> function of rows and columns: how many numbers it may have


FORMATS = {
    "float8_e4m3fn": Format(torch.float8_e4m3fn, 1, {"weight_scale": _one}),
    "float8_e5m2": Format(torch.float8_e5m2, 1, {"weight_scale": _one}),
    "nvfp4": Format(torch.uint8, 2, {"weight_scale": _blocks, "weight_scale_2": _one}),
    "int8_tensorwise": Format(torch.int8, 1, {"weight_scale": _one_or_rows}),
}
# What a layer may have beside: a factor for its input in 8 bits, and one for each column of its input.
BESIDE = {"input_scale": _one, "pre_quant_scale": _columns}
# Ends of the names that parameters of quantised layers have beside weight and bias.
SCALES = tuple(f".{name}" for name in (*OLD_NAMES, *BESIDE))
EIGHT_BITS = {FORMATS[name].stored: name for name in ("float8_e4m3fn", "float8_e5m2")}


class Layer(NamedTuple):
    """A linear layer as the file has it: its format with settings, its weight, its scales by name."""

    settings: dict
    weight: torch.Tensor
    scales: dict[str, torch.Tensor]

    @property
    def shape(self):
        """Of the weight as numbers."""
        rows, columns = self.weight.shape
        return rows, columns * FORMATS[self.settings["format"]].packed


class Quantized(dict):
    """Name -> `Layer`. False for a file without such layers."""

    @property
    def device(self):
        """Where the network is built: marked layers have no weight before they are loaded, and then keep it there."""
        return "cpu" if _reads_marks() else "meta"

    def prepare(self, model_config):
        """Tell core, by its description of a model, which class of layers to build the network of."""
        if _reads_marks():
            model_config.quant_config = {"mixed_ops": True}
        else:
            model_config.scaled_fp8 = next(iter(self.values())).weight.dtype

    def state_dict(self, network):
        """The layers by the keys that `network`, built after `prepare`, takes them by."""
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
    """Formats that the layers of this ComfyUI read."""
    if _reads_marks():
        known, layout = comfy.quant_ops.QUANT_ALGOS, comfy.quant_ops.get_layout_class
        return [name for name in FORMATS if name in known and layout(known[name]["comfy_tensor_layout"]) is not None]
    # Until 0.3.76 one class of layers is for files with a scale factor beside each weight in 8 bits.
    return list(EIGHT_BITS.values()) if hasattr(comfy.supported_models_base.BASE, "scaled_fp8") else []


def _reads_marks():
    """Whether the host's layers are told by `comfy_quant` how they are stored."""
    return hasattr(comfy.supported_models_base.BASE, "quant_config") and hasattr(comfy.quant_ops, "get_layout_class")


def take_quantized(tensors, metadata, rename, path):
    """Move the quantised layers out of `tensors`; returns them as `Quantized`.

    `rename` turns a key of the header into one of `tensors`. Raises ValueError for formats that this ComfyUI does not
    read, and for layers whose parts do not fit each other.
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
            if whole_file is not None and whole_file.numel() == 2:  # so it says that its products are not for 8 bits
                settings[name]["full_precision_matrix_mult"] = True
        elif weight.is_floating_point() and tensors[key].numel() == 1 and tensors[key].item() == 1:
            tensors.pop(key)  # of a layer that was left whole
    _refuse_strange(tensors, settings, path)
    return Quantized({name: _layer(tensors, name, given, path) for name, given in settings.items()})


def _marked(tensors, metadata, rename, path):
    """Layer -> settings, from the header and from the marks, which are taken out of `tensors`."""
    given = {}
    if "_quantization_metadata" in metadata:
        where = f"The entry _quantization_metadata in the header of {path}"
        layers = parse_json(metadata["_quantization_metadata"], where).get("layers")
        if not isinstance(layers, dict):
            raise ValueError(f"{where} has no entry layers, or one that is no object. {INSTEAD}")
        given = {rename(f"{name}.weight").removesuffix(".weight"): value for name, value in layers.items()}
    for key in [key for key in tensors if key.endswith(".comfy_quant")]:
        mark = tensors.pop(key)
        if mark.dtype != torch.uint8 or mark.ndim != 1:
            raise ValueError(f"{path}: {key} is {mark.dtype}, {list(mark.shape)}; it should be text byte by byte. The "
                             "file is damaged.")
        given[key.removesuffix(".comfy_quant")] = parse_json(bytes(mark.tolist()), f"{path}: {key}")
    return {name: _settings(value, f"{path}: the layer {name}") for name, value in given.items()}


def _settings(given, where):
    if not isinstance(given, dict):
        raise ValueError(f"{where} has {shown(given)} for its format, which is no JSON object. The file is damaged.")
    more = given.get("params")
    given = {**(more if isinstance(more, dict) else {}), **given}
    if given.get("format") not in host_formats():
        raise ValueError(f"{where} holds weights in the format {shown(given.get('format'))}, which this ComfyUI does "
                         f"not read; it reads {', '.join(host_formats()) or 'none'}. {INSTEAD}")
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
        raise ValueError(f"{path}: {name} is marked as {settings['format']}, but its weight {found}; expected are two "
                         f"axes of {stored}. The file was changed or saved in part; get it whole.")
    rows, columns = weight.shape
    group = settings.get("convrot_groupsize", 1)
    if group not in GROUPS or columns % group:
        raise ValueError(f"{path}: {name} has {columns} columns, which do not share groups of {group} "
                         f"(convrot_groupsize) evenly. Allowed: {', '.join(map(str, GROUPS))}. The file is damaged.")
    taken = {}
    if not _reads_marks():
        tensors.pop(f"{name}.input_scale", None)  # products are not made in 8 bits there
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
