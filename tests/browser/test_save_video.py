"""Save Video in the page: the result is shown, and dropping a saved file on the canvas restores its graph."""
import pytest

VIDEO_SHOWN = """name => [...document.querySelectorAll('video')].some(
    v => v.currentSrc.includes(name) && v.readyState >= 2 && v.videoWidth == 64)"""
# drawn on the canvas by the classic nodes, a DOM element with Nodes 2.0
PICTURE_SHOWN = """name => [...app.graph._nodes.flatMap(n => n.imgs ?? []), ...document.querySelectorAll('img')].some(
    i => i.src.includes(name) && i.complete && i.naturalWidth == 63)"""


def graph(form):
    picture = {"width": 63, "height": 48, "batch_size": 5, "color": 3368652}
    save = {"images": ["1", 0], "filename_prefix": "page/test", "fps": 8.0, "format": form, "crf": 16}
    return {"1": {"class_type": "EmptyImage", "inputs": picture},
            "2": {"class_type": "Stillmotion_SaveVideo", "inputs": save}}


@pytest.mark.parametrize("kept_page", ["litegraph", "vue"], indirect=True)
@pytest.mark.parametrize("form", ["mp4", "gif", "png frames"])
def test_the_result_is_shown_and_gives_its_graph_back(kept_page, server, form):
    page = kept_page
    page.run_js("graph => app.loadApiJson(graph, 'test')", graph(form))
    shown = page.run()["2"]["images"]
    page.page.wait_for_function(VIDEO_SHOWN if form == "mp4" else PICTURE_SHOWN, arg=shown[0]["filename"])
    path = server.base / "output" / shown[0]["subfolder"] / shown[0]["filename"]
    if form == "gif":
        return
    page.drop(path, "video/mp4" if form == "mp4" else "image/png")
    page.page.wait_for_function("() => app.graph._nodes.length == 2")
    assert [node["type"] for node in page.nodes()] == ["EmptyImage", "Stillmotion_SaveVideo"]
    values = page.run_js("() => app.graph._nodes[1].widgets.map(w => w.value)")
    assert form in values and "page/test" in values


@pytest.mark.parametrize("kept_page", ["litegraph", "vue"], indirect=True)
def test_dates_and_widgets_in_the_prefix_are_filled_in_as_for_core(kept_page):
    page = kept_page
    prefix = "%date:yyyy-MM-dd%/%EmptyImage.width%_%width%"
    given = graph("mp4")
    given["2"]["inputs"]["filename_prefix"] = prefix
    given["3"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}}
    given["4"] = {"class_type": "Stillmotion_BlockAutoregressiveToFile", "inputs": {"filename_prefix": prefix}}
    page.run_js("graph => app.loadApiJson(graph, 'test')", given)
    sent = page.run_js("async () => (await app.graphToPrompt()).output")
    core = sent["3"]["inputs"]["filename_prefix"]
    assert core.endswith("/63_%width%") and "date" not in core
    assert [sent[node]["inputs"]["filename_prefix"] for node in "24"] == [core, core]
    kept = page.run_js("""() => app.graph._nodes.filter(n => n.comfyClass.startsWith('Stillmotion_'))
                          .map(n => n.widgets.find(w => w.name == 'filename_prefix').value)""")
    assert kept == [prefix, prefix]


@pytest.mark.parametrize("kept_page", ["litegraph"], indirect=True)
def test_a_help_page_is_there_for_every_node(kept_page):
    missing = kept_page.run_js("""async () => {
        const ours = Object.keys(LiteGraph.registered_node_types).filter(t => t.startsWith('Stillmotion_'));
        const texts = await Promise.all(ours.map(async t => {
            const answer = await fetch(`/extensions/stillmotion/docs/${t}.md`);
            return answer.ok ? answer.text() : '';
        }));
        return ours.filter((t, i) => !texts[i].startsWith('# '));
    }""")
    assert missing == []
