"""What the demo says of a prompt that it does not know: on the node of the prompt, until it runs again."""
import json
from pathlib import Path

import pytest

ANIMATE = Path(__file__).resolve().parents[2] / "workflows" / "animate.json"
NOTES = """() => app.graph._nodes.flatMap(n => (n.widgets ?? []).filter(w => w.name == '$$node-text-preview')
                                                       .map(w => [n.title, w.value]))"""
SET = """([title, name, value]) => app.graph._nodes.find(n => n.title == title).widgets.find(w => w.name == name)
                                            .value = value"""


@pytest.mark.parametrize("page", ["litegraph", "vue"], indirect=True)
def test_unknown_words_are_named_on_the_node_of_the_prompt_until_it_runs_again(page, request):
    page.load(json.loads(ANIMATE.read_text()))
    page.run_js(SET, ["DDIM Sampler (fixed)", "steps", 1])
    kind = request.node.callspec.params["page"]  # what was encoded is not encoded again
    page.run_js(SET, ["Prompt", "text", f"a {kind} cat"])
    page.run()
    page.page.wait_for_function(f"() => ({NOTES})().length")
    (title, text), = page.run_js(NOTES)
    assert title == "Prompt" and text.startswith("Stillmotion: This small model does not know")
    assert '"cat". It knows words such as' in text
    if kind == "vue":
        page.page.get_by_text("This small model does not know").first.wait_for()  # newer pages show two
    known = f"a blue square moves {'up' if kind == 'vue' else 'down'} on a black background"
    page.run_js(SET, ["Prompt", "text", known])
    page.run()
    page.page.wait_for_function(f"() => !({NOTES})().length")
