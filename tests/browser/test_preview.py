"""The preview while a video is sampled: it changes from step to step, and is gone when the video is there. That of a
training gives way to its last picture."""
import json
from pathlib import Path

import pytest

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
SAMPLER = 6  # the node, in both templates
HEIGHT = f"() => app.graph.getNodeById({SAMPLER}).size[1]"
# keeps every preview of the run
WATCH = """() => {
    window.previews = [];
    app.api.addEventListener('b_preview_with_metadata', async e => {
        const bytes = new Uint8Array(await e.detail.blob.arrayBuffer());
        const picture = await createImageBitmap(e.detail.blob);
        window.previews.push([Array.from(bytes).reduce((sum, byte) => (31 * sum + byte) | 0, 7), picture.width]);
    });
}"""


@pytest.mark.parametrize("page", ["litegraph", "vue"], indirect=True)
def test_the_preview_moves_and_goes_away(page, request):
    page.load(json.loads((WORKFLOWS / "animate.json").read_text()))
    seed = len(request.node.name)  # another one for each kind of page: what was made is not made again
    for name, value in (("steps", 8), ("seed", seed)):
        page.run_js(f"() => app.graph.getNodeById({SAMPLER}).widgets.find(w => w.name == '{name}').value = {value}")
    page.run_js(WATCH)
    height = page.run_js(HEIGHT)
    page.run()
    page.page.wait_for_function(f"""() => !app.nodePreviewImages['{SAMPLER}']?.length
                                          && !app.graph.getNodeById({SAMPLER}).imgs?.length""")
    found = page.run_js("() => window.previews")
    assert len({picture for picture, _ in found}) >= 5 and min(width for _, width in found) >= 64
    page.page.wait_for_function(f"height => ({HEIGHT})() == height", arg=height)


# drawn on the canvas by the classic nodes
PICTURES = """() => (app.graph.getNodeById(3).imgs ?? []).filter(image => image.complete && image.naturalWidth == 604)
                                                         .map(image => image.src)"""


def test_the_last_picture_of_a_training_stays_in_its_node(page, request):
    defaults = page.run_js("""async () => (await (await fetch('/object_info')).json()).Stillmotion_TrainVideoModel""")
    values = {name: entry[1]["default"] for name, entry in defaults["input"]["required"].items()
              if "default" in entry[1]}
    values |= {"steps": 2, "sample_every": 2, "model_channels": 16, "seed": len(request.node.name), "name": "browser",
               "data_set": ["2", 0], "clip": ["1", 1]}
    page.run_js("graph => app.loadApiJson(graph, 'test')", {
        "1": {"class_type": "Stillmotion_LoadDynamiCrafter", "inputs": {"checkpoint": "demo"}},
        "2": {"class_type": "Stillmotion_MovingShapes", "inputs": {"count": 12, "frames": 2, "size": 16}},
        "3": {"class_type": "Stillmotion_TrainVideoModel", "inputs": values}})
    saved, = page.run()["3"]["images"]
    page.page.wait_for_function(f"name => ({PICTURES})().some(address => address.includes(name))",
                                arg=saved["filename"])
