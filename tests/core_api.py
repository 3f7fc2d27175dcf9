"""The API of ComfyUI's own modules, release by release: names, parameters, classes and their bases.

    python tests/core_api.py --record COMFYUI_FOLDER VERSION    add a release, or read one again
    python tests/core_api.py --show NAME                        the history of one name: comfy.sd:VAE.decode

When a release comes out, run --record with a ComfyUI folder; the tests then check the pack against it as well.
Nothing of ComfyUI is imported: names are read from the ASTs, so no release needs to be installed. They are in
cases/core_api/names.json, one name per line with its kind: for all releases, or by first release ("" once removed):

    "comfy.ldm.wan.vae": {
    "count_conv3d": {"0.3.75": "(model)", "0.18.1": ""},

    (a, b=, *, c=)              a function; `=` marks a default; staticmethod( and classmethod( before it
    property                    a property
    class nn.Module, Base       a class and its bases, as its module writes them
    import comfy.ops.cast_to    a name from elsewhere; "import *" lists the modules that all names come from
    as other.name               another name for the same thing, looked up in its module
    value                       anything else
    set                         an attribute set in a class's __init__; one set in other methods is a value
"""
import argparse
import ast
import json
import sys
from pathlib import Path

FILE = Path(__file__).resolve().parent / "cases" / "core_api" / "names.json"

# Modules the pack may depend on; networks of other models, and modules that list them, are excluded.
RECORDED = ["comfy/*.py", "comfy/ldm/common_dit.py", "comfy/ldm/models/autoencoder.py",
            "comfy/ldm/modules/attention.py", "comfy/ldm/wan/ar_model.py", "comfy/ldm/wan/model.py",
            "comfy/ldm/modules/diffusionmodules/model.py", "comfy/ldm/wan/vae*.py", "comfy/taesd/*.py",
            "comfy_api/internal/__init__.py", "comfy_api/latest/*.py",
            "comfy_api/latest/_*/*.py", "comfy_api/torch_helpers/*.py", "comfy_execution/graph_utils.py",
            "comfy_execution/progress.py", "comfy_execution/utils.py", "folder_paths.py", "latent_preview.py",
            "node_helpers.py", "server.py"]
LEFT_OUT = {"controlnet.py", "gligen.py", "sdxl_clip.py", "supported_models.py"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def parameters(arguments: ast.arguments) -> list[str]:
    """As in the definition, without annotations: "a", "b=" with a default, "*", "*rest", "**more"."""
    positional = [*arguments.posonlyargs, *arguments.args]
    bare = len(positional) - len(arguments.defaults)
    listed = [arg.arg if number < bare else arg.arg + "=" for number, arg in enumerate(positional)]
    if arguments.vararg:
        listed.append("*" + arguments.vararg.arg)
    elif arguments.kwonlyargs:
        listed.append("*")
    for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults):
        listed.append(arg.arg if default is None else arg.arg + "=")
    return listed + (["**" + arguments.kwarg.arg] if arguments.kwarg else [])


def described(function) -> str:
    """The record of a function or method."""
    marks = {ast.unparse(mark) for mark in function.decorator_list}
    if any(mark == "property" or mark.endswith(("property", ".setter")) for mark in marks):
        return "property"
    kind = next((mark for mark in ("staticmethod", "classmethod") if mark in marks), "")
    return f"{kind}({', '.join(parameters(function.args))})"


def flat(body):
    """Statements in the scope of `body`, including those inside if, try, with and loops."""
    for statement in body:
        yield statement
        if not isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
            for part in ("body", "orelse", "finalbody"):
                yield from flat(getattr(statement, part, []))
            for handler in getattr(statement, "handlers", []):
                yield from flat(handler.body)


def targets(statement) -> list[ast.expr]:
    """The targets of an assignment, with tuples unpacked."""
    found = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return [each for target in found
            for each in (target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target])]


def imported(statement, package: str):
    """(bound name, dotted path) of an import statement; relative paths are made absolute. A star import binds "*"."""
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2
        return
    above = package.split(".")[:len(package.split(".")) - statement.level + 1] if statement.level else []
    source = ".".join([*above, *([statement.module] if statement.module else [])])
    for alias in statement.names:
        yield alias.asname or alias.name, source if alias.name == "*" else f"{source}.{alias.name}"


class ModuleNames:
    """The names of one module and the record of each."""

    def __init__(self, source: str, package: str):
        self.names, self.package = {}, package
        self.read(ast.parse(source).body, "")

    def read(self, body, prefix: str) -> None:
        for statement in flat(body):
            if isinstance(statement, FUNCTIONS):
                self.names[prefix + statement.name] = described(statement)
            elif isinstance(statement, ast.ClassDef):
                self.read_class(statement, prefix + statement.name)
            elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
                for target in targets(statement):
                    if isinstance(target, ast.Name):
                        self.add(prefix + target.id, self.alias(statement))
            elif isinstance(statement, (ast.Import, ast.ImportFrom)):
                for name, path in imported(statement, self.package):
                    before = self.names.get(prefix + name, "import") if name == "*" else "import"
                    self.names[prefix + name] = f"{before} {path}"
            elif isinstance(statement, ast.Expr) and not prefix:
                self.add_option(statement.value)

    def add(self, name: str, entry: str) -> None:
        """A name that is bound to different things is recorded as a value."""
        self.names[name] = entry if self.names.get(name, entry) == entry else "value"

    def alias(self, statement) -> str:
        if isinstance(statement.value, (ast.Name, ast.Attribute)):
            text = ast.unparse(statement.value)
            if all(part.isidentifier() for part in text.split(".")):
                return f"as {text}"
        return "value"

    def add_option(self, call) -> None:
        """Command-line options, as attributes of `args`: parser.add_argument("--preview-size", ...)."""
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            words = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
            name = next((word for word in words if word.startswith("--")), words[0] if words else "")
            self.names["args." + name.lstrip("-").replace("-", "_")] = "value"

    def read_class(self, node: ast.ClassDef, name: str) -> None:
        bases = [ast.unparse(base).partition("[")[0] for base in node.bases]
        self.names[name] = f"class {', '.join(bases)}".strip()
        self.read(node.body, name + ".")
        marks = [ast.unparse(mark) for mark in node.decorator_list]
        if f"{name}.__init__" not in self.names and not bases and any("dataclass" in mark for mark in marks):
            fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
            listed = [each.target.id + ("=" if each.value else "") for each in fields]
            self.names[f"{name}.__init__"] = f"({', '.join(['self', *listed])})"
        methods = [each for each in flat(node.body) if isinstance(each, FUNCTIONS) and each.args.args]
        for method in sorted(methods, key=lambda each: each.name != "__init__"):
            for attribute in attributes_set(method, {method.args.args[0].arg, node.name}):
                self.names.setdefault(f"{name}.{attribute}", "set" if method.name == "__init__" else "value")


def attributes_set(method, owners: set[str]) -> set[str]:
    """Attributes that a method sets on one of `owners`: self.x = 1."""
    return {node.attr for node in ast.walk(method) if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id in owners}


def read_release(root: Path) -> dict[str, str]:
    """The names of the ComfyUI at `root`: "module:name" -> record. A module itself has the empty name.

    Raises ValueError if there is no ComfyUI.
    """
    found = {}
    paths = {path for pattern in RECORDED for path in root.glob(pattern)}
    for path in sorted(paths - {root / "comfy" / name for name in LEFT_OUT}):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        package = module if parts[-1] == "__init__" else ".".join(parts[:-1])
        found[module + ":"] = "module"
        names = ModuleNames(path.read_text(encoding="utf-8"), package).names
        found |= {f"{module}:{name}": entry for name, entry in names.items()}
    if "comfy.sd:" not in found:
        raise ValueError(f"{root} is no ComfyUI: it has no comfy/sd.py. Give the folder that holds main.py.")
    return found


def order(version: str) -> tuple[int, ...]:
    """Sort key for releases. Raises ValueError for a version that is not dotted numbers."""
    if not all(part.isdecimal() for part in version.split(".")):
        raise ValueError(f"{version!r} is no version: give numbers with dots between, as 0.3.75.")
    return tuple(map(int, version.split(".")))


def load(path: Path = FILE) -> dict[str, dict[str, str]]:
    """version -> names of that release, oldest first."""
    recorded = json.loads(path.read_text(encoding="utf-8"))
    releases = {version: {} for version in recorded.pop("releases")}
    for module, histories in recorded.items():
        for name, history in histories.items():
            changes, entry = {next(iter(releases)): history} if isinstance(history, str) else history, ""
            for version, names in releases.items():
                entry = changes.get(version, entry)
                if entry:
                    names[f"{module}:{name}"] = entry
    return releases


def save(releases: dict[str, dict[str, str]], path: Path = FILE) -> None:
    """Write the file that `load` reads. Raises ValueError for an invalid version."""
    versions = sorted(releases, key=order)
    modules = {}
    for name in sorted(set().union(*releases.values())):
        history, last = {}, ""
        for version in versions:
            entry = releases[version].get(name, "")
            if entry != last:
                history[version] = last = entry
        module, _, name = name.partition(":")
        only = history[versions[0]] if list(history) == versions[:1] else history
        modules.setdefault(module, []).append(f"{json.dumps(name)}: {json.dumps(only)}")
    parts = [f'"releases": {json.dumps(versions)}']
    parts += [f"{json.dumps(module)}: {{\n" + ",\n".join(lines) + "}" for module, lines in modules.items()]
    path.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", nargs=2, metavar=("COMFYUI_FOLDER", "VERSION"))
    parser.add_argument("--show", metavar="NAME")
    options = parser.parse_args()
    releases = load() if FILE.exists() else {}
    if options.record:
        folder, version = options.record
        try:
            releases[version] = read_release(Path(folder))
            save(releases)
        except ValueError as error:
            parser.error(str(error))
        print(f"{version}: {len(releases[version])} names; recorded: {', '.join(sorted(releases, key=order))}")
    elif options.show:
        for version, names in releases.items():
            print(f"{version:>8}  {names.get(options.show, 'is not there')}")
    else:
        parser.error("give --record or --show")


if __name__ == "__main__":
    sys.exit(main())
