"""The pack's structure: what ComfyUI finds in it, and which module may import which (read from the ASTs)."""

import ast
import asyncio
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import comfyui_version
import pytest
import stillmotion
import stillmotion.nodes
from stillmotion.nodes import NODES
from stillmotion.nodes.common import schema

PACK = Path(stillmotion.__file__).parent
RUFF = shutil.which("ruff", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
SOURCES = sorted((PACK / "nodes").rglob("*.py"))
FAMILIES = {"dynamicrafter", "causal_wan", "video_unet"}
NETWORKS = {"unet.py", "attention.py", "resampler.py", "model.py", "blocks.py", "cache.py", "noise.py", "rope.py",
            "keys.py"}
PURE = {"common/patches.py", *(f"ddim/{name}.py" for name in ("schedule", "step", "guidance", "report", "official"))}
# otherwise only node modules import these from ComfyUI: node schemas and file folders
NODE_HELPERS = {"__init__.py", "common/schema.py", "common/examples.py"}
ROOMS_ABOVE = {"diagnosis", "evaluation", "training"}
BELOW = {"common": FAMILIES | ROOMS_ABOVE | {"ddim"}, "ddim": FAMILIES | ROOMS_ABOVE, "evaluation": FAMILIES,
         "diagnosis": {"training"}}  # subpackage: those that it may not import


def node_classes():
    async def ask():
        return await (await stillmotion.comfy_entrypoint()).get_node_list()

    with ThreadPoolExecutor() as thread:  # the browser tests leave an event loop running in this thread
        return thread.submit(asyncio.run, ask()).result()


def test_node_ids_are_ours_and_unique():
    ids = [cls.GET_SCHEMA().node_id for cls in node_classes()]
    assert len(set(ids)) == len(NODES)
    assert all(i.startswith("Stillmotion_") for i in ids)


def test_a_lost_node_can_be_named_by_its_class():
    ids = [cls.GET_SCHEMA().node_id for cls in node_classes()]
    assert ids == [f"Stillmotion_{name.removesuffix('Node')}" for _, name in NODES]


BROKEN = {
    "raises at import": ("RuntimeError: core moved on", "raise RuntimeError('core moved\\non')"),
    "imports what core dropped": ("cannot import name 'dropped_by_core'",
                                  "from comfy_api.latest import dropped_by_core"),
    "lacks the class": ("no attribute 'Broken'", ""),
    "has a schema that fails": ("unexpected keyword argument 'dropped_by_core'", """
from comfy_api.latest import io

class Broken(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Stillmotion_Broken", dropped_by_core=1)

    @classmethod
    def execute(cls):
        pass
"""),
}


@pytest.mark.parametrize("cause, source", BROKEN.values(), ids=BROKEN)
def test_a_broken_family_costs_its_own_nodes_only(cause, source, tmp_path, monkeypatch, caplog):
    module = f"{tmp_path.name}.nodes"  # a different name in each test: Python caches modules
    monkeypatch.setattr(stillmotion.nodes, "__path__", [*stillmotion.nodes.__path__, str(tmp_path.parent)])
    monkeypatch.setattr(stillmotion.nodes, "NODES", [(module, "Broken"), *NODES, (module, "OtherNode")])
    (tmp_path / "nodes.py").write_text(source)
    assert [cls.GET_SCHEMA().node_id for cls in node_classes()] == [f"Stillmotion_{name.removesuffix('Node')}"
                                                                    for _, name in NODES]
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "Stillmotion_Broken" in told[0] and cause in told[0] and "Stillmotion_Other" in told[-1]
    assert len(told) == len({line.split("(")[1] for line in told})  # one line per cause
    for line in told:
        assert comfyui_version.__version__ in line and "Update this pack" in line and "\n" not in line


def test_a_broken_save_video_is_no_obstacle_to_the_others(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "stillmotion.nodes.common.nodes", None)  # importing it fails
    left = {cls.GET_SCHEMA().node_id for cls in node_classes()}
    assert "Stillmotion_DDIMSampler" in left and "Stillmotion_SaveVideo" not in left
    assert "Stillmotion_SaveVideo" in caplog.text


def test_every_socket_and_widget_has_a_tooltip():
    bare = [f"{found.node_id}.{socket.id or socket.display_name}"
            for found in (cls.GET_SCHEMA() for cls in node_classes())
            for socket in found.inputs + found.outputs if not socket.tooltip]
    assert bare == []


def test_every_node_lies_under_stillmotion_and_says_what_it_does():
    for found in (cls.GET_SCHEMA() for cls in node_classes()):
        assert found.category.startswith("Stillmotion/") and found.description, found.node_id


@dataclass
class OldSchema:
    """io.Schema as of a release before 0.10."""

    inputs: list


@dataclass
class NewSchema(OldSchema):
    search_aliases: list = None


@pytest.mark.parametrize("kind, entry, found", [
    (OldSchema, SimpleNamespace(id="shift"), OldSchema([SimpleNamespace(id="shift")])),
    (NewSchema, SimpleNamespace(id="shift", advanced=None),
     NewSchema([SimpleNamespace(id="shift", advanced=True)], ["t2v"])),
], ids=["before 0.10", "0.11"])
def test_a_schema_has_what_the_release_knows(kind, entry, found, monkeypatch):
    monkeypatch.setattr(schema, "io", SimpleNamespace(Schema=kind))
    assert schema.schema(search_aliases=["t2v"], advanced=["shift"], inputs=[entry]) == found


def test_only_inputs_that_are_there_can_be_folded_away():
    with pytest.raises(KeyError, match="shfit"):
        schema.schema(search_aliases=["t2v"], advanced=["shfit"], node_id="Test", inputs=[schema.io.Int.Input("shift")])


def test_aliases_and_folded_inputs_where_the_release_knows_them():
    schemas = {cls.GET_SCHEMA().node_id: cls.GET_SCHEMA() for cls in node_classes()}
    sampler = schemas["Stillmotion_DDIMSampler"]
    if hasattr(sampler, "search_aliases"):
        assert [name for name, found in schemas.items() if not found.search_aliases] == []
        aliases = {alias for found in schemas.values() for alias in found.search_aliases}
        assert aliases >= {"image to video", "i2v", "animate", "long video", "LongLive", "Self Forcing", "interpolate",
                           "loop", "text to video", "t2v", "train", "finetune", "psnr", "gif", "save mp4"}
    if hasattr(sampler.inputs[0], "advanced"):
        widgets = [entry for entry in sampler.inputs if isinstance(entry, schema.io.WidgetInput)]
        assert [entry.id for entry in widgets if not entry.advanced] == ["seed", "steps", "cfg", "eta"]


def imports(path):
    """Modules that a source file imports anywhere; relative ones as their path in the pack: `.nodes.common`."""
    found = set()
    package = path.relative_to(PACK).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[:len(package) - node.level + 1], *(node.module or "").split(".")]
            found |= {"." + ".".join(filter(None, [*base, alias.name])) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def relative_name(path):
    return str(path.relative_to(PACK))


def in_part(path, *parts):
    return path.relative_to(PACK / "nodes").parts[0] in parts


def test_imports_are_read_right():
    found = imports(PACK / "nodes" / "ddim" / "nodes.py")
    assert "comfy_api.latest" in found and ".nodes.ddim.schedule.SPACINGS" in found


def wrong_imports(path):
    """Imports of a source file that break the rules."""
    found, name = imports(path), str(path.relative_to(PACK / "nodes"))
    outside = {module.split(".")[0] for module in found if not module.startswith(".")} - set(sys.stdlib_module_names)
    ours = {module.split(".")[2] for module in found if module.count(".") >= 2}
    wrong = outside & {"nodes", "stillmotion", "workflows", "tests"}  # the pack imports itself only relatively
    wrong |= {module for module in found if module.startswith(".") and not module.startswith(".nodes")}
    if name in PURE or path.name in NETWORKS:
        wrong |= outside - {"torch", "einops"} | {module for module in found if module.startswith(".nodes.common.core")}
    if not path.name.startswith("nodes") and name not in NODE_HELPERS:
        wrong |= outside & {"comfy_api", "folder_paths", "comfy_execution", "server"}
    if in_part(path, *FAMILIES):
        family = path.relative_to(PACK / "nodes").parts[0]
        wrong |= ours & (FAMILIES - {family} | {"training"})
    for part, above in BELOW.items():
        if in_part(path, part):
            wrong |= ours & above
    return wrong


def test_import_directions():
    found = {relative_name(path): wrong_imports(path) for path in SOURCES}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("path", [PACK / "workflows" / "run.py", PACK / "workflows" / "diagnose.py",
                                  *(PACK / "workflows" / "runner" / f"{name}.py" for name in (
                                      "host", "launch", "client", "graph", "commands", "errors", "guard", "batch",
                                      "joblist", "jobgraphs"))],
                         ids=relative_name)
def test_what_runs_before_the_host_exists_needs_the_standard_library_alone(path):
    outside = {module.split(".")[0] for module in imports(path)}
    siblings = {path.stem for path in (PACK / "workflows").rglob("*.py")} | {"runner"}
    assert outside <= set(sys.stdlib_module_names) | siblings


def test_files_keep_to_their_budget():
    for path in [*SOURCES, *sorted((PACK / "workflows").rglob("*.py"))]:
        text = path.read_text(encoding="ascii")
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name == "execute":
                assert node.end_lineno - node.body[0].lineno < 40, path


@pytest.mark.skipif(RUFF is None, reason="ruff is not installed")
def test_the_linter_finds_nothing():
    """Its rules are in pyproject.toml."""
    done = subprocess.run([RUFF, "check", "--no-cache", "--output-format", "concise", PACK], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
