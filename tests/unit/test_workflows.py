"""The shipped workflow files: templates and API graphs match, and the example pictures are available."""
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import stillmotion
from comfy_api.latest._io import WidgetInput
from PIL import Image
from stillmotion.nodes import NODES, load_nodes
from stillmotion.nodes.common.examples import OFFERED, offer_examples
from stillmotion.nodes.dynamicrafter.nodes_quick import PictureToVideo

WORKFLOWS = Path(stillmotion.__file__).parent / "workflows"
SCHEMAS = {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in load_nodes(NODES))}
NAMES = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
TABLE = {entry["name"]: entry for entry in json.loads((WORKFLOWS.parent / "web" / "templates.json").read_text())}
# preset for a real checkpoint, without an API graph: the template that it is made from, and the nodes that differ
PHOTOS = {"photo_512": ("animate", {"Stillmotion_LoadDynamiCrafter"}),
          "photo_1024": ("animate", {"Stillmotion_LoadDynamiCrafter"}),
          "photo_interpolate": ("interpolate", {"Stillmotion_LoadDynamiCrafter"}),
          **dict.fromkeys(("photo_self_forcing", "photo_longlive"), ("causal_image_to_video", {
              "Stillmotion_LoadCausalWan", "Stillmotion_LoadDynamiCrafter", "CLIPLoader", "VAELoader",
              "Stillmotion_CausalWanImageToVideo", "Stillmotion_BlockAutoregressiveSampler", "Stillmotion_SaveVideo",
              "TorchCompileModel"}))}


def read(path):
    return json.loads((WORKFLOWS / path).read_text(encoding="utf-8"))


def test_every_api_graph_has_its_template_and_thumbnail():
    assert {"animate", "causal_continue", "causal_image_to_video", "causal_long_video", "causal_resume",
            "causal_text_to_video", "diagnose", "image_guidance", "interpolate", "ksampler", "loop"} <= set(NAMES)
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == sorted([*NAMES, *PHOTOS]) == sorted(TABLE)
    for kind in ("jpg", "webp"):
        assert sorted(path.stem for path in WORKFLOWS.glob(f"*.{kind}")) == sorted(TABLE)


def test_thumbnails_move_and_differ():
    seen = set()
    for name in TABLE:
        with Image.open(WORKFLOWS / f"{name}.webp") as picture:
            assert picture.n_frames >= 4 and picture.size == (320, 320), name
            frames = [picture.seek(i) or picture.convert("RGB").tobytes() for i in (0, picture.n_frames // 2)]
        assert frames[0] != frames[1], name
        seen.add(frames[0])
        assert (WORKFLOWS / f"{name}.webp").stat().st_size < 200_000
    assert len(seen) == len(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_a_template_has_a_title_a_line_and_a_short_note(name):
    entry = TABLE[name]
    assert 8 <= len(entry["title"]) <= 48 and 30 <= len(entry["description"]) <= 110
    note, = [n for n in read(f"{name}.json")["nodes"] if n["type"] == "MarkdownNote"]
    title, *lines = note["widgets_values"][0].split("\n\n")
    assert title == f"# {entry['title']}" and 2 <= len(lines) <= 3
    assert all(line.startswith("## ") for line in lines) and sum(map(len, lines)) <= 340  # headings: legible when small


@pytest.mark.parametrize("name", PHOTOS)
def test_a_photo_template_is_the_demo_template_with_other_files(name):
    """Same nodes, wires and values, except those that the checkpoint decides; and it says what to download."""
    ours, demo = read(f"{name}.json"), read(f"{PHOTOS[name][0]}.json")
    different = {"MarkdownNote", *PHOTOS[name][1]}

    def rest(workflow, keys):
        return [{key: node.get(key) for key in keys} for node in workflow["nodes"] if node["type"] not in different]

    assert rest(ours, ("id", "type", "title", "widgets_values")) == rest(demo, ("id", "type", "title",
                                                                                "widgets_values"))
    if len(different) == 2:
        assert ours["links"] == demo["links"] and rest(ours, ("pos", "size")) == rest(demo, ("pos", "size"))
    files = {model["name"]: model for node in ours["nodes"] for model in node["properties"].get("models", ())}
    chosen = {value for node in ours["nodes"] if "Load" in node["type"] and node["type"] != "LoadImage"
              for value in node["widgets_values"] if str(value).endswith((".ckpt", ".pt", ".safetensors"))}
    assert chosen == set(files) != set()
    for file in files.values():
        assert file["url"].startswith("https://huggingface.co/") and "/resolve/main/" in file["url"]
        assert file["directory"] in ("checkpoints", "diffusion_models", "loras", "text_encoders", "vae")
    note, = [n["widgets_values"][0] for n in ours["nodes"] if n["type"] == "MarkdownNote"]
    assert all(re.sub(r"_fp8.*|\.safetensors", "", name) in note for name in files)


def test_the_template_for_long_videos_shows_how_to_compile():
    """Off at first: the first run takes longer, and it needs a C++ compiler."""
    compiler, = [n for n in read("photo_longlive.json")["nodes"] if n["type"] == "TorchCompileModel"]
    assert compiler["mode"] == 4 and compiler["widgets_values"] == ["inductor"]  # 4: bypassed


@pytest.mark.parametrize("name", PHOTOS)
def test_the_wires_of_a_photo_template_end_at_sockets(name):
    workflow = read(f"{name}.json")
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, out, target, slot, kind in workflow["links"]:
        sender, receiver = nodes[source]["outputs"][out], nodes[target]["inputs"][slot]
        assert link in sender["links"] and receiver["link"] == link and {sender["type"], receiver["type"]} == {kind}
    used = [s["link"] for node in nodes.values() for s in node["inputs"] if s.get("link")]
    assert sorted(used) == sorted(link[0] for link in workflow["links"])


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
def test_templates_start_with_the_demo_in_its_own_size(name):
    api = read(f"api/{name}.json")
    models = [n["inputs"]["checkpoint"] for n in api.values() if n["inputs"].get("checkpoint", "none") != "none"]
    assert models and all(model.startswith("demo") for model in models)
    sizes = [n["inputs"][side] for n in api.values() for side in ("width", "height") if side in n["inputs"]]
    assert set(sizes) <= {0}


def test_the_one_node_is_the_graph_of_the_template():
    made = PictureToVideo.execute(
        "the image", "a yellow striped star moves right on a cloudy brown background", "demo, 96x96", 123).expand
    demo = read("api/animate.json").values()
    for node in made.values():
        values = {key: value for key, value in node["inputs"].items() if not isinstance(value, list)}
        if node["class_type"] != "CreateVideo":
            given = [other["inputs"] for other in demo if other["class_type"] == node["class_type"]]
            assert any({**inputs, **values, "image": 0} == {**inputs, "image": 0} for inputs in given), node
    assert sorted({n["class_type"] for n in made.values()} ^ {n["class_type"] for n in demo}) == [
        "CreateVideo", "LoadImage", "Stillmotion_SaveVideo"]


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
    (tmp_path / "stillmotion_triangle_end.png").write_bytes(b"the user's own")
    offer_examples(tmp_path)
    entry = {"LoadImage": "image", "LoadVideo": "file", "Stillmotion_ImagePromptFolder": "folder"}
    files = {n["inputs"][entry[n["class_type"]]] for name in NAMES for n in read(f"api/{name}.json").values()
             if n["class_type"] in entry}
    assert files | {OFFERED} == {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "stillmotion_triangle_end.png").read_bytes() == b"the user's own"
    assert len(list((tmp_path / "stillmotion_pictures").iterdir())) == 6


def test_an_example_that_the_user_deleted_does_not_come_back(tmp_path):
    offer_examples(tmp_path)
    (tmp_path / "stillmotion_triangle_end.png").unlink()
    offer_examples(tmp_path)
    assert not (tmp_path / "stillmotion_triangle_end.png").exists() and (tmp_path / "stillmotion_start.png").exists()
    names = (tmp_path / OFFERED).read_text().splitlines()
    assert len(set(names)) == len(names)
    (tmp_path / OFFERED).write_text("stillmotion_start.png\n")  # a later version adds another one
    offer_examples(tmp_path)
    assert (tmp_path / "stillmotion_triangle_end.png").exists()


def test_an_input_folder_that_cannot_be_written_is_no_obstacle(tmp_path, caplog):
    offer_examples(tmp_path / "missing")
    assert "could not be copied to" in caplog.text
