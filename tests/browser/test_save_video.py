"""Save Video in the page: the result is shown, and a saved file dropped on the canvas brings its graph back."""
import pytest

SHOWN = {
    "mp4": "() => [...document.querySelectorAll('video')].some(v => v.readyState >= 2 && v.videoWidth == 64)",
    "gif": "() => [...document.querySelectorAll('img')].some(i => i.complete && i.src.includes('.gif')"
           "      && i.naturalWidth == 63)",
    "png frames": "() => app.graph._nodes.some(n => n.imgs?.length == 5 && n.imgs.every(i => i.naturalWidth == 63))"
                  "      || [...document.querySelectorAll('img')].some(i => i.src.includes('frame_') && i.naturalWidth)",
}


def graph(form):
    return {"1": {"class_type": "EmptyImage", "inputs": {"width": 63, "height": 48, "batch_size": 5, "color": 3368652}},
            "2": {"class_type": "Stillmotion_SaveVideo",
                  "inputs": {"images": ["1", 0], "filename_prefix": "page/test", "fps": 8.0, "format": form, "crf": 16}}}


@pytest.mark.parametrize("form", SHOWN)
def test_the_result_is_shown_and_gives_its_graph_back(page, server, form):
    page.run_js("graph => app.loadApiJson(graph, 'test')", graph(form))
    shown = page.run()["2"]["images"]
    page.page.wait_for_function(SHOWN[form])
    path = server.base / "output" / shown[0]["subfolder"] / shown[0]["filename"]
    if form == "gif":
        return
    page.drop(path, "video/mp4" if form == "mp4" else "image/png")
    page.page.wait_for_function("() => app.graph._nodes.length == 2")
    assert [node["type"] for node in page.nodes()] == ["EmptyImage", "Stillmotion_SaveVideo"]
    values = page.run_js("() => app.graph._nodes[1].widgets.map(w => w.value)")
    assert form in values and "page/test" in values


def test_a_help_page_is_there_for_every_node(page):
    missing = page.run_js("""async () => {
        const ours = Object.keys(LiteGraph.registered_node_types).filter(t => t.startsWith('Stillmotion_'));
        const texts = await Promise.all(ours.map(async t => {
            const answer = await fetch(`/extensions/stillmotion/docs/${t}.md`);
            return answer.ok ? answer.text() : '';
        }));
        return ours.filter((t, i) => !texts[i].startsWith('# '));
    }""")
    assert missing == []
