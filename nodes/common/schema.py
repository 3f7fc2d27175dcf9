"""Node schemas with entries that only newer ComfyUI releases support."""
from dataclasses import fields

from comfy_api.latest import io


def schema(search_aliases, advanced=(), **values):
    """io.Schema(**values) with `search_aliases` and with the inputs named in `advanced` marked as advanced.

    They are omitted on releases that do not support them (before 0.11 and 0.10 respectively). essentials_category is
    not set: with it, the frontend treats a node as core's and no longer lists it among the extensions.
    """
    if "search_aliases" in {field.name for field in fields(io.Schema)}:
        values["search_aliases"] = search_aliases
    made = io.Schema(**values)
    inputs = {entry.id: entry for entry in made.inputs}
    for name in advanced:
        if hasattr(inputs[name], "advanced"):
            inputs[name].advanced = True
    return made
