"""The shipped workflow files: templates and API graphs match, and the example pictures are available."""
import json
from importlib import import_module
from pathlib import Path

import pytest
import stillmotion
from comfy_api.latest._io import WidgetInput
from stillmotion.nodes import NODES, load_nodes
from stillmotion.nodes.common.examples import OFFERED, offer_examples

WORKFLOWS = Path(stillmotion.__file__).parent / "workflows"
SCHEMAS = {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in load_nodes(NODES))}
NAMES = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))


def read(path):
    return json.loads((WORKFLOWS / path).read_text(encoding="utf-8"))


def test_every_api_graph_has_its_template_and_thumbnail():
    assert {"animate", "causal_continue", "causal_image_to_video", "causal_long_video", "causal_resume",
            "causal_text_to_video", "diagnose", "image_guidance", "interpolate", "ksampler", "loop"} <= set(NAMES)
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == NAMES
    assert sorted(path.stem for path in WORKFLOWS.glob("*.jpg")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_template_and_api_graph_are_wired_alike(name):
    ui, api = read(f"{name}.json"), read(f"api/{name}.json")
    notes = [node for node in ui["nodes"] if node["type"] == "MarkdownNote"]
    assert {str(n["id"]): n["type"] for n in ui["nodes"] if n not in notes} == {
        i: n["class_type"] for i, n in api.items()}
    sockets = {node["id"]: [socket["name"] for socket in node["inputs"]] for node in ui["nodes"]}
    wires = {(str(target), sockets[target][slot]): [str(source), out]
             for _, source, out, target, slot, _ in ui["links"]}
    assert wires == {(i, socket): value for i, node in api.items() for socket, value in node["inputs"].items()
                     if isinstance(value, list)}


# the first loader of a workflow, and what its note must mention: real files and where to put them
REAL_FILES = {
    "Stillmotion_LoadVideoUNet": ("Train Video Model", "models/checkpoints"),
    "Stillmotion_LoadDynamiCrafter": ("DynamiCrafter_512", "models/checkpoints"),
    "Stillmotion_LoadCausalWan": ("Self-Forcing", "LongLive", "models/diffusion_models", "umt5_xxl", "wan_2.1_vae")}


@pytest.mark.parametrize("name", NAMES)
def test_templates_start_with_the_demo_and_name_a_real_checkpoint(name):
    ui = read(f"{name}.json")
    loaders = [n for n in ui["nodes"] if n["type"] in REAL_FILES]
    note, = [n for n in ui["nodes"] if n["type"] == "MarkdownNote"]
    assert loaders and all(loader["widgets_values"][0].startswith("demo") for loader in loaders)
    missing = [word for word in REAL_FILES[loaders[0]["type"]] if word not in note["widgets_values"][0]]
    assert missing == []
    if name in ("interpolate", "loop"):
        assert "DynamiCrafter_512_Interp" in note["widgets_values"][0]


# widgets of our nodes that the page follows with a "control after generate" widget
SEEDS = {node_id: [socket.id for socket in schema.inputs if getattr(socket, "control_after_generate", False)]
         for node_id, schema in SCHEMAS.items()}


def widgets_of(node):
    """{widget: value} of a template's node, read by position as the page does."""
    values, found = iter(node.get("widgets_values", ())), {}
    for name in [socket["name"] for socket in node["inputs"] if "widget" in socket]:
        found[name] = next(values)
        if name in SEEDS.get(node["type"], ("seed", "noise_seed")):
            assert next(values) in ("fixed", "randomize", "increment"), node["type"]
    assert list(values) == [], node["type"]
    return found


def test_widgets_are_read_by_position():
    sockets = [{"name": "model"}, {"name": "seed", "widget": {}}, {"name": "cfg", "widget": {}}]
    node = {"type": "Sampler", "inputs": sockets}
    assert widgets_of(node | {"widgets_values": [1, "fixed", 2]}) == {"seed": 1, "cfg": 2}
    with pytest.raises(AssertionError):
        widgets_of(node | {"widgets_values": [1, "fixed", 2, 3]})


@pytest.mark.parametrize("name", NAMES)
def test_template_and_api_graph_have_the_same_values(name):
    ui, api = read(f"{name}.json"), read(f"api/{name}.json")
    for node in ui["nodes"]:
        if str(node["id"]) in api:
            found = widgets_of(node)
            given = {key: value for key, value in api[str(node["id"])]["inputs"].items() if not isinstance(value, list)}
            assert {key: found[key] for key in given} == given, node["type"]


@pytest.mark.parametrize("name", NAMES)
def test_templates_hold_the_widgets_of_each_node_in_their_order(name):
    for node in read(f"{name}.json")["nodes"]:
        if node["type"] in SCHEMAS:
            widgets = [socket.id for socket in SCHEMAS[node["type"]].inputs if isinstance(socket, WidgetInput)]
            assert list(widgets_of(node)) == widgets, node["type"]


@pytest.mark.parametrize("name", NAMES)
def test_a_template_folds_no_value_away_that_it_changes(name):
    """The page hides inputs marked advanced; a template shows them if one is not at its default."""
    folded = {f"Stillmotion_{kind.removesuffix('Node')}": getattr(import_module(f"stillmotion.nodes.{module}"), kind)
              for module, kind in NODES}
    api = read(f"api/{name}.json")
    for node in (node for node in read(f"{name}.json")["nodes"] if node["type"] in folded):
        changed = [entry.id for entry in folded[node["type"]].GET_SCHEMA().inputs if getattr(entry, "advanced", None)
                   and api[str(node["id"])]["inputs"][entry.id] != entry.default]
        assert changed == [] or node.get("showAdvanced"), (node["type"], changed)


def test_a_run_that_is_gone_on_with_keeps_its_seed():
    sampler, = [n for n in read("causal_resume.json")["nodes"]
                if n["type"] == "Stillmotion_BlockAutoregressiveSampler"]
    assert "fixed" in sampler["widgets_values"] and "randomize" not in sampler["widgets_values"]


def test_files_of_the_workflows_are_put_into_the_input_folder_once(tmp_path):
    (tmp_path / "stillmotion_end.png").write_bytes(b"the user's own")
    offer_examples(tmp_path)
    entry = {"LoadImage": "image", "LoadVideo": "file", "Stillmotion_ImagePromptFolder": "folder"}
    files = {n["inputs"][entry[n["class_type"]]] for name in NAMES for n in read(f"api/{name}.json").values()
             if n["class_type"] in entry}
    assert files | {OFFERED} == {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "stillmotion_end.png").read_bytes() == b"the user's own"
    assert len(list((tmp_path / "stillmotion_pictures").iterdir())) == 6


def test_an_example_that_the_user_deleted_does_not_come_back(tmp_path):
    offer_examples(tmp_path)
    (tmp_path / "stillmotion_end.png").unlink()
    offer_examples(tmp_path)
    assert not (tmp_path / "stillmotion_end.png").exists() and (tmp_path / "stillmotion_start.png").exists()
    names = (tmp_path / OFFERED).read_text().splitlines()
    assert len(set(names)) == len(names)
    (tmp_path / OFFERED).write_text("stillmotion_start.png\n")  # a later version adds another one
    offer_examples(tmp_path)
    assert (tmp_path / "stillmotion_end.png").exists()


def test_an_input_folder_that_cannot_be_written_is_no_obstacle(tmp_path, caplog):
    offer_examples(tmp_path / "missing")
    assert "could not be copied to" in caplog.text
