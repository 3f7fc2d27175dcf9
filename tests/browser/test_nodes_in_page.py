"""How the page of newer releases shows the nodes: searchable by purpose, advanced inputs collapsed."""
import pytest

FOUND = {  # search text -> a node that must be listed
    "image to video": "DynamiCrafter Image to Video",
    "i2v": "Causal Wan Image to Video",
    "animate": "DynamiCrafter Image to Video",
    "long video": "Block-Autoregressive Sampler",
    "LongLive": "Load Causal Wan",
    "self forcing": "Load Causal Wan",
    "interpolate": "DynamiCrafter Image to Video",
    "loop": "DynamiCrafter Image to Video",
    "text to video": "Video U-Net Conditions",
    "t2v": "Causal Wan Image to Video",
    "finetune": "Train Video Model",
    "psnr": "Evaluate Video",
    "gif": "Save Video (MP4, GIF, frames)",
    "save mp4": "Save Video (MP4, GIF, frames)",
}
LABELS = """() => [...document.querySelectorAll('[data-node-id] [data-testid="widget-layout-field-label"]')]
                  .map(label => label.innerText.trim())"""


def test_nodes_are_found_by_what_they_are_for(page):
    told = page.run_js("async () => (await (await fetch('/object_info/Stillmotion_SaveVideo')).json())")
    if "search_aliases" not in told["Stillmotion_SaveVideo"]:
        pytest.skip("this ComfyUI does not know search aliases")
    page.run_js("() => app.graph.clear()")
    page.page.mouse.dblclick(800, 700)
    box = page.page.locator("input[aria-controls=results-list]")
    for typed, node in FOUND.items():
        box.fill(typed)
        page.page.locator("[role=option]", has_text=node).first.wait_for()


@pytest.mark.parametrize("page", ["vue"], indirect=True)
def test_rarely_changed_inputs_are_folded_away_until_asked_for(page):
    if page.run_js("() => app.extensionManager.setting.get('Comfy.Node.AlwaysShowAdvancedWidgets')") is None:
        pytest.skip("this ComfyUI's page does not fold inputs away")
    page.run_js("() => { app.graph.clear(); app.graph.add(LiteGraph.createNode('Stillmotion_DDIMSampler')); }")
    more = page.page.get_by_test_id("advanced-inputs-button")
    more.wait_for()
    assert page.run_js(LABELS) == ["seed", "steps", "cfg", "eta"]
    more.dispatch_event("pointerup")
    more.dispatch_event("click")
    page.page.wait_for_function(f"() => ({LABELS})().length == 14")
