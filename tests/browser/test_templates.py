"""The workflow templates in the page: they are complete, match their API graphs, and run with the demo model."""
import json
from pathlib import Path

import pytest
from client import Client

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
TO_API = "async () => (await app.graphToPrompt()).output"
NAMES = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
SAVER = "Stillmotion_SaveVideo"


def api_graph(name):
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())


VIDEOS = [name for name in NAMES if any(node["class_type"] == SAVER for node in api_graph(name).values())]


@pytest.fixture(scope="module")
def known(server):
    """{class: names of its inputs} on the server."""
    schemas = Client(server.url, server).json("/object_info")
    return {kind: {name for section in ("required", "optional") for name in schema["input"].get(section, {})}
            for kind, schema in schemas.items()}


def inputs(graph, known):
    """{node id: (class, inputs)} without what the page adds (Preview Any's text, a video player once visible)."""
    return {i: (n["class_type"], {k: v for k, v in n["inputs"].items() if k in known[n["class_type"]]})
            for i, n in graph.items()}


@pytest.mark.parametrize("kept_page", ["litegraph"], indirect=True)
def test_the_page_lists_all_templates_with_thumbnails(kept_page):
    page = kept_page
    listed = page.run_js("async () => (await (await fetch('/workflow_templates')).json()).stillmotion")
    templates = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
    assert sorted(listed) == templates
    pictures = [f"{name}.{kind}" for name in templates for kind in ("webp", "jpg")]
    widths = page.run_js("""names => Promise.all(names.map(name => new Promise((done, failed) => {
        const image = new Image();
        [image.onload, image.onerror] = [() => done(image.naturalWidth), () => failed(new Error(name))];
        image.src = `/api/workflow_templates/stillmotion/${name}`;
    })))""", pictures)
    assert min(widths) >= 200


@pytest.mark.parametrize("kept_page", ["litegraph"], indirect=True)
@pytest.mark.parametrize("name", VIDEOS)
def test_a_template_opens_whole_runs_and_shows_its_video(kept_page, server, known, name):
    opens_runs_and_shows(kept_page, server, known, name)


@pytest.mark.parametrize("kept_page", ["vue"], indirect=True)
@pytest.mark.parametrize("name", ["animate", "causal_long_video"])
def test_so_it_does_with_nodes_2(kept_page, server, known, name):
    opens_runs_and_shows(kept_page, server, known, name)


def opens_runs_and_shows(page, server, known, name):
    page.load(json.loads((WORKFLOWS / f"{name}.json").read_text()))
    broken = [node for node in page.nodes() if node["errors"] or not node["known"]]
    assert broken == [] and page.dialogs() == []
    api = api_graph(name)
    assert inputs(page.run_js(TO_API), known) == inputs(api, known)

    saver, = [i for i, node in api.items() if node["class_type"] == SAVER]
    for node, given in ((i, found["inputs"]) for i, found in api.items() if "steps" in found["inputs"]):
        given["steps"] = 2 if isinstance(given["steps"], int) else "1000, 500"  # 2 steps are fast
        page.run_js("([id, steps]) => app.graph.getNodeById(id).widgets.find(w => w.name == 'steps').value = steps",
                    [int(node), given["steps"]])
    saved, side = page.run()[saver]["images"][0], 96 if "demo, 96x96" in json.dumps(api) else 64
    page.page.wait_for_function("""([name, side]) => [...document.querySelectorAll('video')].some(
        v => v.currentSrc.includes(name) && v.readyState >= 2 && v.videoWidth == side)""",
                                arg=[saved["filename"], side])
    page.drop(server.base / "output" / saved["subfolder"] / saved["filename"], "video/mp4")
    page.page.wait_for_function("count => app.graph._nodes.length == count", arg=len(api) + 1)  # plus the note
    assert inputs(page.run_js(TO_API), known) == inputs(api, known)
