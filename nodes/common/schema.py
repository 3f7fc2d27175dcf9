"""Node schemas, with what the pages of newer ComfyUI releases show of a node."""
from dataclasses import fields

from comfy_api.latest import io


def schema(search_aliases, advanced=(), **values):
    """io.Schema(**values) of a node that `search_aliases` find, with the inputs named in `advanced` folded away.

    Releases that do not know the one (before 0.11) or the other (before 0.10) get the schema without. There is no
    essentials_category: with one, the page counts a node as core's and no longer lists it among the extensions.
    """
    if "search_aliases" in {field.name for field in fields(io.Schema)}:
        values["search_aliases"] = search_aliases
    made = io.Schema(**values)
    inputs = {entry.id: entry for entry in made.inputs}
    for name in advanced:
        if hasattr(inputs[name], "advanced"):
            inputs[name].advanced = True
    return made
