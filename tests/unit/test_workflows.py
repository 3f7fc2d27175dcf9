"""The shipped workflows as files: templates and API graphs say the same, and the example pictures are within reach."""
import json
from pathlib import Path

import folder_paths
import pytest
import stillmotion
from stillmotion.nodes.common.nodes import offer_examples

WORKFLOWS = Path(stillmotion.__file__).parent / "workflows"
NAMES = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))


def read(path):
    return json.loads((WORKFLOWS / path).read_text(encoding="utf-8"))


def test_every_api_graph_has_its_template_and_thumbnail():
    assert NAMES == ["animate", "diagnose", "image_guidance", "interpolate", "ksampler", "loop"]
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


@pytest.mark.parametrize("name", NAMES)
def test_templates_start_with_the_demo_and_name_a_real_checkpoint(name):
    ui = read(f"{name}.json")
    loader, = [n for n in ui["nodes"] if n["type"] == "Stillmotion_LoadDynamiCrafter"]
    note, = [n for n in ui["nodes"] if n["type"] == "MarkdownNote"]
    assert loader["widgets_values"][0] == "demo"
    wanted = "DynamiCrafter_512_Interp" if name in ("interpolate", "loop") else "DynamiCrafter_512"
    assert wanted in note["widgets_values"][0] and "models/checkpoints" in note["widgets_values"][0]


def test_pictures_of_the_workflows_are_put_into_the_input_folder_once(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    (tmp_path / "stillmotion_end.png").write_bytes(b"the user's own")
    offer_examples()
    pictures = {n["inputs"]["image"] for name in NAMES for n in read(f"api/{name}.json").values()
                if n["class_type"] == "LoadImage"}
    assert pictures == {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "stillmotion_end.png").read_bytes() == b"the user's own"


def test_an_input_folder_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / "missing"))
    offer_examples()
    assert "could not be put into" in caplog.text
