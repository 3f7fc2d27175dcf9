"""Check that a recorded release of ComfyUI has what the pack uses.

`findings(pack, release)` lists the mismatches: names that are imported or accessed but missing, calls with arguments
that a function or constructor does not accept, overrides of core's methods with incompatible signatures, and classes
that neither call core's `__init__` nor set the attributes it sets.
"""
from __future__ import annotations

import ast
from typing import NamedTuple

from core_api import described, flat, imported
from core_release import UNKNOWN, Found, Release, Signature, last_kept
from core_uses import OwnClass, Pack, Reader, Ref, Use

# Node methods whose parameters are the node's own inputs.
INPUTS = {"execute", "validate_inputs", "fingerprint_inputs", "check_lazy_status"}
# The base class's method is a bare stub; core passes the parameters of another class's method.
BARE = {"comfy.samplers:Sampler.sample": "comfy.samplers:KSAMPLER.sample"}
# Types of core's attributes.
HOLDS = {
    "comfy.clip_vision:ClipVisionModel.model": "comfy.clip_model.CLIPVisionModelProjection",
    "comfy.clip_vision:ClipVisionModel.patcher": "comfy.model_patcher.ModelPatcher",
    "comfy.model_base:BaseModel.latent_format": "comfy.latent_formats.LatentFormat",
    "comfy.model_base:BaseModel.model_config": "comfy.supported_models_base.BASE",
    "comfy.model_patcher:ModelPatcher.model": "comfy.model_base.BaseModel",
    "comfy.samplers:CFGGuider.inner_model": "comfy.model_base.BaseModel",
    "comfy.samplers:CFGGuider.model_patcher": "comfy.model_patcher.ModelPatcher",
    "comfy.sd:CLIP.patcher": "comfy.model_patcher.ModelPatcher",
    "comfy.sd:VAE.patcher": "comfy.model_patcher.ModelPatcher",
}


class Finding(NamedTuple):
    file: str
    line: int
    fault: str  # what is used and why it does not match
    release: str  # what the release has instead

    def __str__(self):
        return f"{self.file}:{self.line}: {self.fault} ({self.release})"

    @property
    def exception(self) -> str:
        """Its name in the lists of exceptions."""
        return f"{self.file}: {self.fault}"


class Check:
    """Checks one pack against one release."""

    def __init__(self, pack: Pack, release: Release):
        self.pack, self.release, self.found = pack, release, {}
        self.orders = {own: self.order(own) for own in pack.classes}

    def order(self, own: OwnClass) -> list:
        """The class and its bases, ours and core's, in method resolution order."""
        ordered = [own]
        for reader, node, scopes in own.bases:
            reader.scopes, before = scopes, reader.scopes
            base = reader.ref(node)
            reader.scopes = before
            if base is not None and base.kind == "own":
                ordered += self.order(base.of)
            elif base is not None and base.kind == "core":
                known = self.release.find(base.name) or UNKNOWN
                ordered += self.release.mro(known) if known.is_class else [known]
            else:
                ordered.append(self.foreign(reader, node))
        return last_kept(ordered)

    def foreign(self, reader: Reader, node) -> Found:
        """A base from Python or torch."""
        text = ast.unparse(node)
        for statement in flat(reader.tree.body):
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                for name, path in imported(statement, reader.package):
                    if text == name or text.startswith(name + "."):
                        return Found(path + text.removeprefix(name), "external")
        return UNKNOWN

    def deriving(self, own: OwnClass) -> list[list]:
        """The MROs of all classes that include `own` and have a core class among their bases."""
        return [order for order in self.orders.values() if own in order
                and any(isinstance(each, Found) and each.is_class for each in order)]

    def report(self, file: str, line: int, fault: str, release: str) -> None:
        self.found.setdefault((file, line, fault), Finding(file, line, fault, f"{self.release.version} {release}"))

    def run(self) -> list[Finding]:
        for use in self.pack.uses:
            self.use(use)
        for own in self.pack.classes:
            for order in self.deriving(own):
                self.overrides(own, order[order.index(own) + 1:])
            if self.deriving(own):
                self.left_unset(own)
        return sorted(self.found.values())

    # ---- uses ----

    def use(self, use: Use) -> None:
        for subject, found, bound in self.meanings(use.ref):
            if found is None:
                self.report(use.file, use.line, f"{subject} is not there", "has no such name")
            elif use.call and found.entry not in ("unknown", "external"):
                self.call(use, subject, found, bound)

    def call(self, use: Use, subject: str, found: Found, bound: bool) -> None:
        if found.is_class:
            found, bound = self.release.member(self.release.mro(found), "__init__") or UNKNOWN, True
        if found.is_function:
            signature = Signature(found.entry, bound)
            wrong = signature.takes(*use.call)
            if wrong:
                self.report(use.file, use.line, f"{subject}(): {wrong}", f"has {signature.text}")

    def meanings(self, ref: Ref):
        """(name for messages, what the release has, whether it is called on an object) for everything `ref` may be."""
        if ref.kind == "core":
            found = self.release.find(ref.name)
            yield ref.name, found, False
        elif ref.kind == "either":
            wanted, other = ref.of
            there = [each for each in self.meanings(wanted) if each[1]]
            yield from there or (self.meanings(other) if other else [])
        elif ref.kind == "own":
            yield from self.constructor(ref.of)
        elif ref.kind == "attribute":
            yield from self.attributes(ref.of, ref.name)

    def constructor(self, own: OwnClass):
        """Core's `__init__`, for a class of ours without one."""
        order = self.orders[own]
        if not any(isinstance(each, OwnClass) and "__init__" in each.methods for each in order):
            found = self.release.member([each for each in order if isinstance(each, Found)], "__init__")
            yield own.name, found or UNKNOWN, True

    def attributes(self, holder: Ref, name: str):
        own = holder.of if holder.kind == "instance" else holder
        if holder.kind == "super" or own.kind == "own":
            yield from self.of_own(own.of, name, holder)
            return
        for subject, found, _ in self.meanings(own):
            if found is not None and found.key in HOLDS:
                found = self.release.find(HOLDS[found.key])
            if found is not None and found.is_class and not self.added(found, name):
                yield f"{subject}.{name}", self.release.inside(found, name), holder.kind != "either"

    def of_own(self, own: OwnClass, name: str, holder: Ref):
        """Attributes of our own classes that core's bases must provide."""
        for order in self.deriving(own):
            rest = order[order.index(own) + 1:] if holder.kind == "super" else order
            if not any(isinstance(each, OwnClass) and name in each for each in rest):
                cores = [each for each in rest if isinstance(each, Found)]
                holds = {"super": "super()", "instance": "self"}.get(holder.kind, "cls")
                yield f"{own.name}: {holds}.{name}", self.release.member(cores, name), holder.kind != "own"

    def added(self, core: Found, name: str) -> bool:
        """Whether one of our subclasses of a core class adds the attribute."""
        return any(name in each for order in self.orders.values() if core in order
                   for each in order[:order.index(core)] if isinstance(each, OwnClass))

    # ---- classes ----

    def overrides(self, own: OwnClass, rest: list) -> None:
        cores = [each for each in rest if isinstance(each, Found) and each.is_class]
        for name, method in own.methods.items():
            owner = next((each for each in cores if f"{each.key}.{name}" in self.release.names), None)
            if owner is None or name in INPUTS or name == "__init__":
                continue
            found = self.release.settled(f"{owner.key}.{name}")
            if found.is_function and described(method) != "property":
                core = Signature(self.release.names.get(BARE.get(found.key), found.entry), bound=True)
                wrong = Signature(described(method), bound=True).stands_in_for(core)
                if wrong:
                    self.report(own.file, method.lineno, f"{own.name}.{name} {wrong}",
                                f"has {found.key}{core.text}")

    def left_unset(self, own: OwnClass) -> None:
        """A class that does not call core's __init__ must set the attributes that __init__ sets."""
        init = own.methods.get("__init__")
        if init is None or any(isinstance(node, ast.Attribute) and node.attr == "__init__" for node in ast.walk(init)):
            return
        order = self.orders[own]
        prefixes = {each.key + "." for each in order if isinstance(each, Found) and each.is_class}
        for key, entry in self.release.names.items():
            owner, _, name = key.rpartition(".")
            if entry == "set" and owner + "." in prefixes and not any(
                    isinstance(each, OwnClass) and name in each for each in order):
                self.report(own.file, init.lineno, f"{own.name}: self.{name} is not set",
                            f"sets it in {owner}.__init__, which is not called")


def findings(pack: Pack, release: Release) -> list[Finding]:
    return Check(pack, release).run()
