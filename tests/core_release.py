"""Look up names in the record of one ComfyUI release (core_api.py), and compare signatures."""
from __future__ import annotations

import builtins
import importlib
import sys
from functools import cache
from typing import NamedTuple


class Found(NamedTuple):
    """`entry` as in core_api.py, with imports and aliases resolved; `key` is "module:name".

    Two more entries: "external" for names outside the records, with the dotted path as `key`; "unknown" otherwise.
    """

    key: str
    entry: str

    @property
    def is_class(self) -> bool:
        return self.entry.split(" ")[0] == "class"

    @property
    def is_function(self) -> bool:
        return self.entry.endswith(")")


UNKNOWN = Found("", "unknown")


class Release:
    """Names of one release: `find` and `inside` return None for a missing name."""

    def __init__(self, version: str, names: dict[str, str]):
        self.version, self.names = version, names
        modules = {name[:-1] for name in names if name.endswith(":")}
        self.packages = modules | {module.rpartition(".")[0] for module in modules if "." in module}
        self.parents = {key.rpartition(".")[0] for key in names if "." in key.partition(":")[2]}

    def find(self, path: str) -> Found | None:
        first, *rest = path.split(".")
        if not self.is_core(path):
            return Found(path, "external")
        found = Found(f"{first}:", "module")
        for part in rest:
            found = found and self.inside(found, part)
        return found

    def is_core(self, path: str) -> bool:
        root = path.partition(".")[0]
        return any(name == root or name.startswith(root + ".") for name in self.packages)

    def inside(self, found: Found, name: str) -> Found | None:
        """The attribute `name` of `found`."""
        if found.entry == "module":
            return self.in_module(found.key[:-1], name)
        if found.is_class:
            return self.member(self.mro(found), name)
        if found.entry == "external":
            return Found(f"{found.key}.{name}", "external")
        if found.key in self.parents:
            return self.settled(f"{found.key}.{name}")
        return UNKNOWN

    def in_module(self, module: str, name: str) -> Found | None:
        if f"{module}:{name}" in self.names:
            return self.settled(f"{module}:{name}")
        if f"{module}.{name}" in self.packages:
            return Found(f"{module}.{name}:", "module")
        stars = self.names.get(f"{module}:*", "").split()[1:]
        return next(filter(None, (self.in_module(star, name) for star in stars)), None)

    def settled(self, key: str) -> Found | None:
        """What `key` refers to, with imports and aliases resolved."""
        entry = self.names.get(key)
        if entry is None:
            return None
        kind, _, rest = entry.partition(" ")
        if kind == "import":
            # a module excluded from the records, or a name in it
            return self.find(rest) or UNKNOWN
        return self.named(key, rest) if kind == "as" else Found(key, entry)

    def named(self, key: str, path: str) -> Found:
        """What the name `path` refers to in the scope where `key` is defined."""
        module, _, inside = key.partition(":")
        first, *rest = path.split(".")
        around = inside.rpartition(".")[0]
        beside = f"{module}:{around}.{first}" if around else key
        found = self.settled(beside) if beside != key and beside in self.names else self.in_module(module, first)
        if found is None and hasattr(builtins, first):
            found = Found(f"builtins.{first}", "external")
        for part in rest:
            found = found and self.inside(found, part)
        return found or UNKNOWN

    def mro(self, found: Found) -> list[Found]:
        """A class and its bases in method resolution order."""
        bases = found.entry.removeprefix("class").strip()
        ordered = [found]
        for base in filter(None, bases.split(", ")):
            known = self.named(found.key, base)
            ordered += self.mro(known) if known.is_class else [known]
        return last_kept(ordered)

    def member(self, mro: list[Found], name: str) -> Found | None:
        """The attribute `name` of a class with this MRO."""
        for owner in mro:
            if owner.is_class and f"{owner.key}.{name}" in self.names:
                return self.settled(f"{owner.key}.{name}")
            if not owner.is_class:
                kind = outside(owner.key) if owner.entry == "external" else None
                if kind is None or hasattr(kind, name):
                    return UNKNOWN
        return UNKNOWN if hasattr(object, name) else None


@cache
def outside(path: str):
    """The Python class `path`, or torch's Module; None for other libraries, whose objects may have any attribute."""
    root, *names = path.split(".")
    if root not in sys.stdlib_module_names and path != "torch.nn.Module":
        return None
    thing = importlib.import_module(root)
    for name in names:
        thing = getattr(thing, name, None)
    return thing if isinstance(thing, type) else None


def last_kept(ordered: list) -> list:
    """Remove duplicates, keeping the last, because a shared base comes after all classes derived from it."""
    return list(reversed(dict.fromkeys(reversed(ordered))))


class Signature:
    """Parameters of a recorded function: "(self, x, y=, *, z=, **more)"."""

    def __init__(self, entry: str, bound: bool):
        kind, _, inner = entry[:-1].partition("(")
        listed = [name for name in inner.split(", ") if name]
        if (bound and kind != "staticmethod") or kind == "classmethod":
            listed = listed[1:] if listed and not listed[0].startswith("*") else listed
        star = next((number for number, name in enumerate(listed) if name.startswith("*")), len(listed))
        self.text = f"({', '.join(listed)})"
        self.positional = [name.rstrip("=") for name in listed[:star]]
        self.keyword_only = [name.rstrip("=") for name in listed[star:] if not name.startswith("*")]
        self.required = [name for name in listed if not name.startswith("*") and not name.endswith("=")]
        self.rest = any(name.startswith("*") and name.strip("*") and not name.startswith("**") for name in listed)
        self.more = any(name.startswith("**") for name in listed)

    def takes(self, positional: int, keywords: set[str], spread: bool, partial: bool = False) -> str:
        """What is wrong with a call, or "". `spread`: it has *args or **kwargs, whose contents are unknown."""
        if positional > len(self.positional) and not self.rest:
            return f"{positional} positional arguments, at most {len(self.positional)} allowed"
        unknown = keywords - {*self.positional, *self.keyword_only}
        if unknown and not self.more:
            return f"no parameter {', '.join(sorted(unknown))}"
        twice = keywords & set(self.positional[:positional])
        if twice:
            return f"{', '.join(sorted(twice))} given twice"
        missing = [name for name in self.required if name not in keywords and name not in self.positional[:positional]]
        return f"{', '.join(missing)} not given" if missing and not spread and not partial else ""

    def stands_in_for(self, core: Signature) -> str:
        """Why an override with these parameters is incompatible with core's method, or "".

        Core passes required parameters by position, so their names may differ; optional ones may come by keyword.
        """
        for number, name in enumerate(core.positional):
            if number >= len(self.positional):
                if not self.rest and not (self.more or name in self.keyword_only):
                    return f"takes no {name}"
            elif self.positional[number] != name and (name not in core.required or name in self.positional):
                return f"has {self.positional[number]} where core has {name}"
        unknown = [name for name in core.keyword_only if name not in {*self.positional, *self.keyword_only}]
        if (unknown or core.more) and not self.more:
            return f"takes no {', '.join(unknown) or '**kwargs'}"
        if core.rest and not self.rest:
            return "takes no *args"
        passed = sum(name in core.required for name in core.positional)
        extra = [name for name in self.required if name in self.keyword_only or name in self.positional[passed:]]
        return f"requires {', '.join(extra)}, which core does not pass" if extra else ""
