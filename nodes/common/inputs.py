"""Validation of node inputs: only values that the schema allows reach a node, whatever the graph contains."""
from __future__ import annotations

import math

from torch import Tensor

from .values import check_text, shown

PLAIN = (str, int, float, list, dict)  # literal values that a graph can contain where a socket expects a link


def checked(node):
    """Wrap `node` so that `execute` raises a readable ValueError for inputs that its schema does not allow.

    ComfyUI does not reject constants in place of a link, out-of-range numbers that arrive over a link, NaN or, before
    0.33, invalid choices.
    """
    class Checked(node):
        @classmethod
        def execute(cls, **values):
            for entry in node.GET_SCHEMA().inputs:
                if entry.id in values:
                    check_input(entry, values[entry.id])
            return super().execute(**values)

    Checked.__name__, Checked.__qualname__, Checked.__module__ = node.__name__, node.__qualname__, node.__module__
    return Checked


def check_input(entry, value) -> None:
    """Raise ValueError for a value that schema input `entry` does not accept."""
    kind, name = str(entry.get_io_type()), entry.id
    if value is None:
        if not entry.optional:
            raise ValueError(f"{name} is empty: {'give a value' if kind in WIDGETS else 'connect it'}.")
    elif kind in WIDGETS:
        WIDGETS[kind](entry, value)
    elif not SOCKETS.get(kind, _is_object)(value):
        given = f"of the shape {list(value.shape)}" if isinstance(value, Tensor) else shown(value)
        raise ValueError(f"{name} is {given}, which is no {kind}: connect a node that gives one.")


def _check_choice(entry, value):
    if not isinstance(value, str):
        raise ValueError(f"{entry.id} is {shown(value)}: choose one of the names that its list shows.")


def _check_text(entry, value):
    if not isinstance(value, str):
        raise ValueError(f"{entry.id} is {shown(value)}: give text.")
    check_text(entry.id, value)


def _check_number(entry, value):
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{entry.id} is {shown(value)}: give a number.")
    if not entry.min <= value <= entry.max:
        raise ValueError(f"{entry.id} is {value}: allowed are {entry.min} to {entry.max}.")


def _check_switch(entry, value):
    if not isinstance(value, (bool, int)):
        raise ValueError(f"{entry.id} is {shown(value)}: give true or false.")


def _is_image(value) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.shape[-1] in (1, 3, 4) and value.numel() > 0


def _is_latent(value) -> bool:
    return isinstance(value, dict) and hasattr(value.get("samples"), "shape")


def _is_conditioning(value) -> bool:
    return isinstance(value, list) and all(isinstance(part, (list, tuple)) and len(part) == 2 and
                                           isinstance(part[0], Tensor) and isinstance(part[1], dict) for part in value)


def _is_object(value) -> bool:
    return not isinstance(value, PLAIN)


WIDGETS = {"INT": _check_number, "FLOAT": _check_number, "STRING": _check_text, "BOOLEAN": _check_switch,
           "COMBO": _check_choice}
SOCKETS = {"IMAGE": _is_image, "LATENT": _is_latent, "CONDITIONING": _is_conditioning}
