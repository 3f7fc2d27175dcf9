"""The preview while a video is sampled: it changes from step to step, and is gone when the video is there."""
import json
from pathlib import Path

import pytest

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
SAMPLER = 6  # the node, in both templates
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
    page.run()
    page.page.wait_for_function(f"() => !app.nodePreviewImages['{SAMPLER}']")
    found = page.run_js("() => window.previews")
    assert len({picture for picture, _ in found}) >= 5 and min(width for _, width in found) >= 64
