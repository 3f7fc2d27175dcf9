"""What the pack uses of ComfyUI, found by static analysis of its ASTs.

Tracked are: imports, aliases (`kinds = comfy.model_base.ModelType`), parameters that are annotated or named as in
GIVEN, attributes that hold such an object, objects returned by a class or by a function with a return annotation,
`self` and `super()` in classes that derive from core's.
"""
from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

from core_api import FUNCTIONS, attributes_set, flat, imported, targets

CORE = ("comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "node_helpers", "server")
# Types of unannotated parameters with these names. Networks take their layer classes as a parameter.
GIVEN_CLASSES = {"operations": "comfy.ops.manual_cast", "conv1d": "comfy.ops.manual_cast.Conv1d",
                 "conv3d": "comfy.ops.manual_cast.Conv3d"}
GIVEN = {"clip": "comfy.sd.CLIP", "clip_vision": "comfy.clip_vision.ClipVisionModel",
         "executor": "comfy.patcher_extension.WrapperExecutor", "guider": "comfy.samplers.CFGGuider",
         "model": "comfy.model_patcher.ModelPatcher", "patcher": "comfy.model_patcher.ModelPatcher",
         "vae": "comfy.sd.VAE"}
# Files where `model` means something else.
OTHER_MODEL = {"nodes/causal_wan/sampler.py": "comfy.model_base.BaseModel", "nodes/ddim/official.py": "elsewhere"}


class Ref(NamedTuple):
    """What an expression refers to.

    "core": the dotted path `name`. "module", "own": a module or a class of the pack. "made": what the function `of`
    returns. "instance", "super": of the class `of`. "attribute": `name` of the object `of`. "either": the first of the
    two in `of` that the release has.
    """

    kind: str
    name: str = ""
    of: object = None


class Use(NamedTuple):
    file: str
    line: int
    ref: Ref
    call: tuple | None = None  # positional, keywords, spread, partial


class OwnClass:
    """A class of the pack. `bases` are (reader, expression, scopes), resolved after all modules have been read."""

    def __init__(self, node: ast.ClassDef, file: str, bases: list):
        self.node, self.name, self.file, self.bases = node, node.name, file, bases
        self.holds = {}  # attribute -> Ref of its value
        self.methods = {each.name: each for each in flat(node.body) if isinstance(each, FUNCTIONS)}
        self.values = {target.id for each in flat(node.body) if isinstance(each, (ast.Assign, ast.AnnAssign))
                       for target in targets(each) if isinstance(target, ast.Name)}
        for method in self.methods.values():
            if method.args.args:
                self.values |= attributes_set(method, {method.args.args[0].arg, node.name})

    def __contains__(self, name: str) -> bool:
        return name in self.methods or name in self.values


class Pack:
    """Classes and uses of all sources; `sources` maps paths below the pack's folder, with "/", to their text."""

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
    """Dotted name relative to the pack: "nodes/common/vae.py" is ".nodes.common.vae", "__init__.py" is ""."""
    parts = file.removesuffix(".py").split("/")
    return "".join("." + part for part in (parts[:-1] if parts[-1] == "__init__" else parts))


class Reader(ast.NodeVisitor):
    """Walks one source file, tracking the names in scope."""

    def __init__(self, pack: Pack, file: str, text: str):
        self.pack, self.file, self.tree = pack, file, ast.parse(text)
        self.module = module_name(file)
        package = self.module if file.endswith("__init__.py") else self.module.rpartition(".")[0]
        self.package = "pack" + package
        self.scopes: list[dict] = [{}]
        self.owners: list[OwnClass] = []

    # ---- names ----

    def bind_names(self) -> None:
        """Module-level names: imports, classes, aliases of core's names."""
        for statement in flat(self.tree.body):
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                self.bind_import(statement)
            elif isinstance(statement, ast.ClassDef):
                self.scopes[0][statement.name] = self.own_class(statement)
            elif isinstance(statement, FUNCTIONS) and statement.returns:
                self.scopes[0][statement.name] = Ref("made", statement.name, (self, statement.returns))

    def own_class(self, node: ast.ClassDef) -> Ref:
        known = next((each for each in self.pack.classes if each.node is node), None)
        if known is None:
            known = OwnClass(node, self.file, [(self, base, list(self.scopes)) for base in node.bases])
            self.pack.classes.append(known)
        return Ref("own", node.name, known)

    def bind_import(self, statement) -> None:
        for name, path in imported(statement, self.package):
            root = path.partition(".")[0]
            if root == "pack":
                self.scopes[-1][name] = Ref("module", path.removeprefix("pack"))
            else:
                self.scopes[-1][name] = Ref("core", path) if root in CORE else None

    def lookup(self, name: str):
        scope = next((scope for scope in reversed(self.scopes) if name in scope), {})
        return self.own(scope.get(name))

    def own(self, ref):
        """Correct a Ref to a module of the pack that is actually a name in one."""
        if ref is not None and ref.kind == "module" and ref.name not in self.pack.readers:
            module, _, name = ref.name.rpartition(".")
            reader = self.pack.readers.get(module)
            return reader.own(reader.scopes[0].get(name)) if reader else None
        return ref

    def ref(self, node):
        """What the expression refers to; None if unknown."""
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
        called = self.ref(node.func)
        if called is not None and called.kind == "made":
            reader, annotation = called.of
            called = reader.ref(annotation)
        return instance(called)

    def attribute(self, ref, name: str):
        if ref is None:
            return None
        if ref.kind == "core":
            return Ref("core", f"{ref.name}.{name}")
        if ref.kind == "module":
            return self.own(Ref("module", f"{ref.name}.{name}"))
        if ref.kind == "instance" and ref.of.kind == "own" and name in ref.of.of.holds:
            return ref.of.of.holds[name]
        return Ref("attribute", name, ref) if ref.kind in ("instance", "super", "own", "either", "attribute") else None

    # ---- uses ----

    def add(self, node, ref, call=None) -> None:
        if ref is not None and ref.kind not in ("module", "made") and (call or ref.kind != "own"):
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
        if ref is None or ref.kind != "core":
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
        target, value = node.targets[0], node.value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts):
                self.assign(one, self.ref(its))
        else:
            self.assign(target, self.ref(value))

    def visit_AnnAssign(self, node) -> None:
        self.generic_visit(node)
        self.assign(node.target, instance(self.ref(node.annotation)))

    def assign(self, target, ref) -> None:
        if isinstance(target, ast.Name):
            self.scopes[-1][target.id] = ref
        elif isinstance(target, ast.Attribute):
            owner = self.ref(target.value)
            if owner is not None and owner.kind == "instance" and owner.of.kind == "own":
                owner.of.of.values.add(target.attr)
                if ref is not None:
                    owner.of.of.holds.setdefault(target.attr, ref)

    def visit_ClassDef(self, node) -> None:
        ref = self.own_class(node)
        self.scopes[-1][node.name] = ref
        self.owners.append(ref.of)
        self.scopes.append({})
        for field in node.body:
            if isinstance(field, ast.AnnAssign):
                ref.of.holds[field.target.id] = instance(self.ref(field.annotation))
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
        if argument.arg in GIVEN_CLASSES:
            return Ref("core", GIVEN_CLASSES[argument.arg])
        if argument.annotation:
            return instance(self.ref(argument.annotation))
        given = OTHER_MODEL.get(self.file, GIVEN["model"]) if argument.arg == "model" else GIVEN.get(argument.arg)
        return Ref("instance", of=Ref("core", given)) if given else None


def instance(kind):
    """Ref to an object of the class that `kind` refers to."""
    return Ref("instance", of=kind) if kind is not None and kind.kind in ("core", "own", "either") else None
