"""Checkpoint files: read safely regardless of file name, with a clear error message for invalid files."""

import contextlib
import logging
import os
import pickle
import re
import struct
from dataclasses import dataclass

import safetensors
import torch

log = logging.getLogger(__name__)

FORMATS = "a .safetensors file, or a .ckpt / .pt file written by torch.save"
AGAIN = "Compare its size with the source and download or copy it again."

# Key components that training wrappers (DDP, DeepSpeed, FSDP, torch.compile, activation checkpointing) insert.
WRAPPERS = {"module", "_forward_module", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}
# Names under which training code stores the model in a checkpoint.
ENVELOPES = ("state_dict", "module", "model_state_dict", "model")
ROWS = ".rows"  # after the key of an embedding table: for each row, whether the file holds it; the others are zero


@dataclass(frozen=True)
class Checkpoint:
    """A file's tensors by key, and its header entries (empty for pickles)."""

    path: str
    tensors: dict
    metadata: dict


def read_checkpoint(path, values=True):
    """Read a checkpoint's tensors without running any code in it.

    The format is detected from the first bytes, not from the name. Tensors are memory-mapped if the format allows it
    (safetensors, torch.save since 1.6), so that a 10 GB file is not read until it is used. A model nested in a
    dictionary (`ENVELOPES`) is unwrapped, and key components added by training wrappers (`WRAPPERS`) are removed. If
    a file holds several models, each in its own dictionary, their keys are prefixed with the dictionary's name and a
    dot (`generator.`, `generator_ema.`). With `values` False, a file that cannot be memory-mapped (torch.save before
    1.6) is not read whole: its tensors are on the meta device, with names and shapes only.

    Returns a `Checkpoint`. Raises ValueError for a file that is truncated, is not a checkpoint, has duplicate keys, or
    is a pickle that would run code.
    """
    path = str(path)
    with open(path, "rb") as file:
        head = file.read(64)
    if head[:4] == b"PK\x03\x04":
        # Given a path, torch.load detects .safetensors by name, so pass it the open file instead.
        return Checkpoint(path, _unwrap(path, _read_pickle(path, mmap=not path.endswith(".safetensors"))), {})
    # Must precede the next check: a header's length can start with the same byte as a pickle.
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head[:1] == b"\x80":
        return Checkpoint(path, _unwrap(path, _read_pickle(path, mmap=False)) if values else _read_names(path), {})
    raise ValueError(f"{path} is not a checkpoint: {_look(head)}. Use {FORMATS}.")


def _look(head):
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; the weights themselves were not downloaded"
    if head.lstrip()[:1] == b"<":
        return "it is a web page that was saved instead of the weights (perhaps a login or error page)"
    return f"it starts with {head[:8]!r}"


def _read_safetensors(path):
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            return Checkpoint(path, with_all_rows(unwrapped(tensors, path)), file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a complete .safetensors file ({error}). {AGAIN}") from error


def _read_pickle(path, mmap):
    try:
        with open(path, "rb") as file:
            return torch.load(path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise ValueError(f"{path} is a damaged pickle or not a checkpoint. Use {FORMATS}.") from error
        raise ValueError(
            f"{path} is refused: besides weights it holds the Python object {found[1]}, and loading it could run "
            "code on this computer. Get the same weights as .safetensors, or re-saved with torch.save(state_dict) by "
            "a source you trust.") from error
    except (RuntimeError, OSError, EOFError, struct.error, LookupError, ValueError, TypeError, AttributeError,
            AssertionError, ArithmeticError, MemoryError) as error:
        raise ValueError(f"{path} is cut off, or is a zip or pickle that is no checkpoint ({error}). "
                         f"{AGAIN} Allowed: {FORMATS}.") from error


def _read_names(path):
    """Meta tensors of an old torch.save file, whose values are skipped where this PyTorch can."""
    skipping = getattr(torch.serialization, "skip_data", contextlib.nullcontext)
    with skipping():
        tensors = _unwrap(path, _read_pickle(path, mmap=False))
    held = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors.values()}
    if sum(held.values()) > os.path.getsize(path):
        raise ValueError(f"{path} is cut off: its weights take {sum(held.values())} bytes, and the file has "
                         f"{os.path.getsize(path)}. {AGAIN}")
    return {key: value.to("meta") for key, value in tensors.items()}


def _unwrap(path, found):
    """The dict of tensors inside what torch.save stored."""
    for _ in ENVELOPES:  # they may be nested
        found = next((found[name] for name in ENVELOPES if _is_only_model(found, name)), found)
    if isinstance(found, dict) and not any(isinstance(value, torch.Tensor) and value.ndim for value in found.values()):
        # A number stored next to them, such as the step, may be a tensor too.
        found = {f"{name}.{key}": value for name, part in found.items() if isinstance(part, dict)
                 for key, value in part.items() if isinstance(value, torch.Tensor) and isinstance(key, str)}
    tensors = {key: value for key, value in found.items() if isinstance(value, torch.Tensor) and isinstance(key, str)
               } if isinstance(found, dict) else {}
    if not tensors:
        raise ValueError(f"{path} holds no weights: a {type(found).__name__} without named tensors was found. "
                         "Use a file with a state dict (tensors by name).")
    if any(value.is_meta for value in tensors.values()):
        raise ValueError(f"{path} holds names and shapes without values (tensors on the meta device). Save it again "
                         "after the weights were loaded.")
    others = [str(key) for key in found if key not in tensors]
    if others:
        log.info("%s: ignored entries that are not tensors: %s", path, ", ".join(others))
    return unwrapped(tensors, path)


def _is_only_model(found, name):
    """Whether `found[name]` is the only model in the file. Always true for a dictionary named state_dict or module."""
    if not isinstance(found, dict) or not isinstance(found.get(name), dict):
        return False
    return name in ENVELOPES[:2] or sum(
        isinstance(part, dict) and any(isinstance(value, torch.Tensor) and value.ndim for value in part.values())
        for part in found.values()) == 1


def unwrapped(tensors, path):
    """`tensors` with the key components added by training wrappers removed."""
    named = {".".join(part for part in key.split(".") if part not in WRAPPERS): value for key, value in tensors.items()}
    if len(named) < len(tensors):
        raise ValueError(f"{path}: {len(tensors) - len(named)} keys name the same weights twice, with and without a "
                         "wrapper's prefix. Save the state dict of the network alone.")
    return named


def with_all_rows(tensors):
    """`tensors` with the rows of embedding tables that `without_zero_rows` left out."""
    whole = dict(tensors)
    for name, held_V in tensors.items():
        table = tensors.get(name.removesuffix(ROWS)) if name.endswith(ROWS) else None
        if (table is not None and table.ndim and held_V.ndim == 1 and held_V.dtype == torch.bool
                and held_V.sum() == len(table)):
            whole[name.removesuffix(ROWS)] = filled = table.new_zeros(len(held_V), *table.shape[1:])
            filled[held_V] = table
            del whole[name]
    return whole


def without_zero_rows(tensors, key):
    """`tensors` with the zero rows of the embedding table `key` left out; `key` + ROWS says which rows are kept. The
    tables of the small demo models hold few of the tokenizer's 49408 words."""
    held_V = tensors[key].any(dim=1)
    return {**tensors, key: tensors[key][held_V].contiguous(), key + ROWS: held_V}


def check_kinds(path, tensors):
    """Raise ValueError for weights that are not plain floating-point tensors: integer, complex, boolean, sparse."""
    strange = [f"{key} is {'quantised' if value.is_quantized else str(value.dtype).removeprefix('torch.')}"
               f"{'' if value.layout == torch.strided else ', sparse'}" for key, value in tensors.items()
               if not value.is_floating_point() or value.is_quantized or value.layout != torch.strided]
    if strange:
        raise ValueError(f"{path}: {len(strange)} weights are not of a kind that a network can use: "
                         f"{'; '.join(strange[:3])}. Allowed are floating-point numbers (fp32, fp16, bf16, fp8). The "
                         "file was changed or is of another kind. Use the original one.")


def take_prefix(tensors, prefix):
    """Move all tensors whose key starts with `prefix` out of `tensors`; returns them without the prefix."""
    return {key[len(prefix):]: tensors.pop(key) for key in [key for key in tensors if key.startswith(prefix)]}


def check_keys(part, found, expected, cause):
    """Check that no key is missing, unexpected or of the wrong shape.

    `part` and `cause` are for the message; `found` maps key -> tensor, `expected` maps key -> shape, both
    named as in the file. Raises ValueError with the first few names of each kind.
    """
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    shapes = [f"{key} is {list(found[key].shape)}, expected {list(shape)}"
              for key, shape in expected.items() if key in found and tuple(found[key].shape) != tuple(shape)]
    wrong = [f"{len(names)} {kind}: {'; '.join(names[:5])}{'; ...' if len(names) > 5 else ''}"
             for kind, names in (("missing", missing), ("not known", extra), ("of another shape", shapes)) if names]
    if wrong:
        raise ValueError(f"The {part} does not fit. Keys {'. Keys '.join(wrong)}. {cause}")
