"""What the pack uses of ComfyUI, read from its syntax trees, and whether a recorded release has it.

`findings(pack, release)` lists what does not fit: names that are imported or reached but not there, calls whose
arguments a function or constructor does not take, methods that stand in for core's and cannot be called as those are.
Only what the text says is followed: imports, second names (`kinds = comfy.model_base.ModelType`), annotated
parameters, objects made by a call of a class, `self` and `super()` in classes that derive from core's.
"""
from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

from core_api import FUNCTIONS, attributes_set, described, flat, imported, targets
from core_release import UNKNOWN, Found, Release, Signature, last_kept

CORE = ("comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "node_helpers", "server")
# Networks take their layer classes as a parameter: in ComfyUI one of these.
GIVEN = {"operations": "comfy.ops.manual_cast", "conv3d": "comfy.ops.manual_cast.Conv3d"}
# Methods of nodes whose parameters are the node's own inputs.
INPUTS = {"execute", "validate_inputs", "fingerprint_inputs", "check_lazy_status"}


class Ref(NamedTuple):
    """What an expression stands for.

    kind: "core" (`name` a dotted path), "own" (a class of the pack), "module" (of the pack), "instance", "super" (`of`
    the class), "attribute" (`name` of the object `of`), "either" (`name` if the release has it, else `of`).
    """

    kind: str
    name: str = ""
    of: object = None


class Use(NamedTuple):
    file: str
    line: int
    ref: Ref
    call: tuple | None = None  # positional, keywords, spread, partial


class Finding(NamedTuple):
    file: str
    line: int
    subject: str  # what is used, as exceptions name it
    problem: str

    def __str__(self):
        return f"{self.file}:{self.line}: {self.subject}: {self.problem}"


class OwnClass:
    """A class of the pack. `bases` are Refs, None for what lies outside."""

    def __init__(self, node: ast.ClassDef, module: str, file: str, bases: list):
        self.node, self.name, self.file, self.bases = node, node.name, file, bases
        self.methods = {each.name: each for each in flat(node.body) if isinstance(each, FUNCTIONS)}
        self.values = {target.id for each in flat(node.body) if isinstance(each, (ast.Assign, ast.AnnAssign))
                       for target in targets(each) if isinstance(target, ast.Name)}
        for method in self.methods.values():
            if method.args.args:
                self.values |= attributes_set(method, {method.args.args[0].arg, node.name})

    def __contains__(self, name: str) -> bool:
        return name in self.methods or name in self.values


class Pack:
    """Classes and uses of all sources; `sources` are paths below the pack's folder, "/" between, with their text."""

    def __init__(self, sources: dict[str, str]):
        self.uses: list[Use] = []
        self.classes: list[OwnClass] = []
        self.readers = {module_name(file): Reader(self, file, text) for file, text in sources.items()}
        for reader in self.readers.values():
            reader.bind_names()
        for reader in self.readers.values():
            reader.visit(reader.tree)

    @classmethod
    def of_folder(cls, folder: Path) -> Pack:
        files = [folder / "__init__.py", *sorted((folder / "nodes").rglob("*.py"))]
        return cls({file.relative_to(folder).as_posix(): file.read_text(encoding="utf-8") for file in files})


def module_name(file: str) -> str:
    """Dotted, below the pack: "nodes/common/vae.py" is ".nodes.common.vae", "__init__.py" is ""."""
    parts = file.removesuffix(".py").split("/")
    return "".join("." + part for part in (parts[:-1] if parts[-1] == "__init__" else parts))


class Reader(ast.NodeVisitor):
    """Walks one source with the names that are visible at each place."""

    def __init__(self, pack: Pack, file: str, text: str):
        self.pack, self.file, self.tree = pack, file, ast.parse(text)
        self.module = module_name(file)
        package = self.module if file.endswith("__init__.py") else self.module.rpartition(".")[0]
        self.package = "pack" + package
        self.scopes: list[dict] = [{}]
        self.owners: list[OwnClass] = []

    # ---- names ----

    def bind_names(self) -> None:
        """Names of the module itself: imports, classes, second names of what core has."""
        for statement in flat(self.tree.body):
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                self.bind_import(statement)
            elif isinstance(statement, ast.ClassDef):
                self.scopes[0][statement.name] = self.own_class(statement)

    def own_class(self, node: ast.ClassDef) -> Ref:
        known = next((each for each in self.pack.classes if each.node is node), None)
        if known is None:
            known = OwnClass(node, self.module, self.file, [self.written(base) for base in node.bases])
            self.pack.classes.append(known)
        return Ref("own", node.name, known)

    def bind_import(self, statement) -> None:
        for name, path in imported(statement, self.package):
            root = path.partition(".")[0]
            if root == "pack":
                self.scopes[-1][name] = Ref("module", path.removeprefix("pack"))
            else:
                self.scopes[-1][name] = Ref("core", path) if root in CORE else None

    def written(self, node):
        """Bases are looked up when all modules are read."""
        return self, node, list(self.scopes)

    def lookup(self, name: str):
        scope = next((scope for scope in reversed(self.scopes) if name in scope), {})
        return self.own(scope.get(name))

    def own(self, ref):
        """A Ref to a module of the pack that is in truth a name in one."""
        if ref is not None and ref.kind == "module" and ref.name not in self.pack.readers:
            module, _, name = ref.name.rpartition(".")
            reader = self.pack.readers.get(module)
            return reader.own(reader.scopes[0].get(name)) if reader else None
        return ref

    def ref(self, node):
        """What the expression stands for; None where it is not told."""
        if isinstance(node, ast.Name):
            return self.lookup(node.id)
        if isinstance(node, ast.Attribute):
            return self.attribute(self.ref(node.value), node.attr)
        if isinstance(node, ast.BinOp):  # an annotation: X | None
            return self.ref(node.left)
        if not isinstance(node, ast.Call):
            return None
        if isinstance(node.func, ast.Name) and node.func.id == "super" and self.owners:
            return Ref("super", of=self.owners[-1])
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and isinstance(node.args[1], ast.Constant):
            wanted = self.attribute(self.ref(node.args[0]), node.args[1].value)
            return wanted if len(node.args) == 2 else wanted and Ref("either", of=(wanted, self.ref(node.args[2])))
        made = self.ref(node.func)
        return Ref("instance", of=made) if made and made.kind in ("core", "own", "either") else None

    def attribute(self, ref, name: str):
        if ref is None:
            return None
        if ref.kind == "core":
            return Ref("core", f"{ref.name}.{name}")
        if ref.kind == "module":
            return self.own(Ref("module", f"{ref.name}.{name}"))
        return Ref("attribute", name, ref) if ref.kind in ("instance", "super", "own", "either") else None

    # ---- uses ----

    def add(self, node, ref, call=None) -> None:
        if ref is not None and ref.kind not in ("own", "module") or call and ref:
            self.pack.uses.append(Use(self.file, node.lineno, ref, call))

    def visit_Import(self, node) -> None:
        self.bind_import(node)
        for alias in node.names:
            if alias.name.partition(".")[0] in CORE:
                self.add(node, Ref("core", alias.name))

    def visit_ImportFrom(self, node) -> None:
        self.bind_import(node)
        for _, path in imported(node, self.package):
            if path.partition(".")[0] in CORE:
                self.add(node, Ref("core", path))

    def visit_Attribute(self, node) -> None:
        ref = self.ref(node)
        if isinstance(node.ctx, ast.Load):
            self.add(node, ref)
        if ref is None or ref.kind == "attribute":
            self.visit(node.value)

    def visit_Call(self, node) -> None:
        function, given = node.func, node.args
        partial = isinstance(function, ast.Name) and function.id == "partial" and bool(given)
        if partial:
            function, given = given[0], given[1:]
        spread = any(isinstance(arg, ast.Starred) for arg in given) or any(not word.arg for word in node.keywords)
        positional = sum(not isinstance(arg, ast.Starred) for arg in given)
        ref = self.ref(function)
        self.add(node, ref, (positional, {word.arg for word in node.keywords if word.arg}, spread, partial))
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(given) == 2:
            self.add(node, self.ref(node))
        self.generic_visit(node)

    def visit_Assign(self, node) -> None:
        self.generic_visit(node)
        if isinstance(node.targets[0], ast.Name):
            self.scopes[-1][node.targets[0].id] = self.ref(node.value)

    def visit_ClassDef(self, node) -> None:
        ref = self.own_class(node)
        self.scopes[-1][node.name] = ref
        self.owners.append(ref.of)
        self.scopes.append({})
        self.generic_visit(node)
        self.scopes.pop()
        self.owners.pop()

    def visit_FunctionDef(self, node) -> None:
        arguments = node.args
        listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        names = {each.id: None for each in ast.walk(node) if isinstance(each, ast.Name)
                 and isinstance(each.ctx, ast.Store)}
        for argument in [*listed, *filter(None, (arguments.vararg, arguments.kwarg))]:
            names[argument.arg] = self.parameter(argument) if argument in listed else None
        if self.owners and self.owners[-1].methods.get(getattr(node, "name", "")) is node and listed:
            marks = {ast.unparse(mark) for mark in node.decorator_list}
            owner = Ref("own", self.owners[-1].name, self.owners[-1])
            if "staticmethod" not in marks:
                names[listed[0].arg] = owner if "classmethod" in marks else Ref("instance", of=owner)
        self.scopes.append(names)
        self.generic_visit(node)
        self.scopes.pop()

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def parameter(self, argument):
        if argument.arg in GIVEN:
            return Ref("core", GIVEN[argument.arg])
        kind = self.ref(argument.annotation) if argument.annotation else None
        return Ref("instance", of=kind) if kind and kind.kind in ("core", "own") else None


# ---- against a release ----


class Check:
    """Holds one pack against one release."""

    def __init__(self, pack: Pack, release: Release):
        self.pack, self.release, self.found = pack, release, {}
        self.orders = {own: self.order(own) for own in pack.classes}

    def order(self, own: OwnClass) -> list:
        """The class and its bases, ours and core's, in the order that they are searched."""
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
        """Orders of all classes that `own` is part of and that have a class of core among their bases."""
        return [order for order in self.orders.values() if own in order
                and any(isinstance(each, Found) and each.is_class for each in order)]

    def report(self, file: str, line: int, subject: str, problem: str) -> None:
        self.found.setdefault((file, line, subject), Finding(file, line, subject, problem))

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
                self.report(use.file, use.line, subject, f"{self.release.version} has no such name")
            elif use.call and found.entry not in ("unknown", "external"):
                self.call(use, subject, found, bound)

    def call(self, use: Use, subject: str, found: Found, bound: bool) -> None:
        if found.is_class:
            found, bound = self.release.member(self.release.mro(found), "__init__") or UNKNOWN, True
        if found.is_function:
            signature = Signature(found.entry, bound)
            wrong = signature.takes(*use.call)
            if wrong:
                self.report(use.file, use.line, subject + "()", f"{wrong}; {self.release.version} has {signature.text}")

    def meanings(self, ref: Ref):
        """(name for messages, what the release has, whether it is called on an object) of all that `ref` may be."""
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
        for each in self.orders[own]:
            if isinstance(each, OwnClass) and "__init__" in each.methods:
                return
            if isinstance(each, Found):
                found = self.release.member(self.after(self.orders[own], each, include=True), "__init__")
                if found is not None:
                    yield own.name, found, True
                return

    def attributes(self, holder: Ref, name: str):
        of = holder.of
        if holder.kind == "super" or holder.kind in ("instance", "own") and (
                of if holder.kind == "own" else of.of if of.kind == "own" else None) is not None:
            own = of if holder.kind in ("super", "own") else of.of
            for order in self.deriving(own):
                rest = order[order.index(own) + 1:] if holder.kind == "super" else order
                if not any(isinstance(each, OwnClass) and name in each for each in rest):
                    cores = [each for each in rest if isinstance(each, Found)]
                    yield f"{own.name}: {'super()' if holder.kind == 'super' else 'self'}.{name}", self.release.member(
                        cores, name), holder.kind != "own"
        elif holder.kind in ("instance", "either"):
            for subject, found, _ in self.meanings(of if holder.kind == "instance" else holder):
                if found is not None and found.is_class:
                    yield f"{subject}.{name}", self.release.inside(found, name), holder.kind == "instance"

    @staticmethod
    def after(order: list, start, include=False) -> list[Found]:
        return [each for each in order[order.index(start) + (not include):] if isinstance(each, Found)]

    # ---- classes ----

    def overrides(self, own: OwnClass, rest: list) -> None:
        cores = [each for each in rest if isinstance(each, Found) and each.is_class]
        for name, method in own.methods.items():
            owner = next((each for each in cores if f"{each.key}.{name}" in self.release.names), None)
            if owner is None or name in INPUTS or name == "__init__":
                continue
            found = self.release.settled(f"{owner.key}.{name}")
            if found.is_function and described(method) != "property":
                core = Signature(found.entry, bound=True)
                wrong = Signature(described(method), bound=True).stands_in_for(core)
                if wrong:
                    self.report(own.file, method.lineno, f"{own.name}.{name}",
                                f"{wrong}; {self.release.version} has {owner.key}.{name}{core.text}")

    def left_unset(self, own: OwnClass) -> None:
        """A class that does not call core's __init__ has to set what that one sets."""
        init = own.methods.get("__init__")
        if init is None or any(isinstance(node, ast.Attribute) and node.attr == "__init__" for node in ast.walk(init)):
            return
        order = self.orders[own]
        prefixes = {each.key + "." for each in order if isinstance(each, Found) and each.is_class}
        for key, entry in self.release.names.items():
            owner, _, name = key.rpartition(".")
            if entry == "set" and owner + "." in prefixes and not any(
                    isinstance(each, OwnClass) and name in each for each in order):
                self.report(own.file, init.lineno, f"{own.name}: self.{name}",
                            f"is not set; {self.release.version} sets it in {owner}.__init__, which is not called")


def findings(pack: Pack, release: Release) -> list[Finding]:
    return Check(pack, release).run()
