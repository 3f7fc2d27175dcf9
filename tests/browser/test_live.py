"""The panel of the causal samplers: blocks are played as they come, prompts are sent, and the run is stopped."""
import json
import time
from itertools import count
from pathlib import Path

import av
import pytest

GRAPH = Path(__file__).resolve().parents[2] / "workflows" / "api" / "causal_long_video.json"
SAMPLER, TO_FILE = "Stillmotion_BlockAutoregressiveSampler", "Stillmotion_BlockAutoregressiveToFile"
SEEDS = count()  # ComfyUI does not run a node again with the same inputs
PANEL = ".stillmotion-live"
STATE = """() => {
    const panel = app.graph._nodes.map(n => n.stillmotionLive).find(p => p?.prompt_id);
    if (!panel) return null;
    const { position, total, first, playing, ended, blocks, shown } = panel.player;
    const context = panel.canvas.getContext('2d', { willReadFrequently: true });
    const pixels = context.getImageData(0, 0, panel.canvas.width, panel.canvas.height).data;
    return { position, total, first, playing, ended, shown, blocks: blocks.length, sum: pixels.reduce((a, b) => a + b),
             told: panel.told.innerText, status: panel.status.innerText };
}"""


VIEW = """() => {  // the whole node, with room for the panel
    const node = app.graph._nodes.find(n => n.comfyClass.startsWith('Stillmotion_BlockAutoregressive'));
    app.canvas.ds.scale = 0.5;
    app.canvas.ds.offset[0] = 400 - node.pos[0];
    app.canvas.ds.offset[1] = 120 - node.pos[1];
    app.canvas.setDirty(true, true);
}"""


def graph(**changes):
    """The long video until stopped, straight to a file, with two steps a block."""
    found = json.loads(GRAPH.read_text())
    sampler, = (node for node in found.values() if node["class_type"] == SAMPLER)
    sampler["class_type"] = TO_FILE
    sampler["inputs"] |= {"steps": "1000, 600", "length": -1, "filename_prefix": "video/live", "fps": 8.0, "crf": 16,
                          "clip": ["2", 1], "seed": next(SEEDS), **changes}
    for node in ("7", "8"):
        del found[node]
    return found


def wait(page, condition):
    """Wait until `condition`, JavaScript on the panel's state `s`, holds; returns the state."""
    page.page.wait_for_function(f"() => {{ const s = ({STATE})(); return s && ({condition}) }}", polling=100)
    return page.run_js(STATE)


def answer_late(route):
    """Hold the answer back, until the prompt most likely is in use already."""
    answer = route.fetch()
    time.sleep(3)
    route.fulfill(response=answer)


@pytest.mark.parametrize("page", ["litegraph", "vue"], indirect=True)
def test_a_run_is_seen_steered_and_stopped_in_its_node(page, server):
    page.run_js("graph => app.loadApiJson(graph, 'test')", graph())
    page.run_js(VIEW)
    page.run_js("() => { window.ended = false; app.api.addEventListener('execution_success', () => ended = true); }")
    page.run_js("() => app.queuePrompt(0, 1)")
    begun = wait(page, "s.blocks >= 2 && s.position > 1")
    assert wait(page, f"s.position > {begun['position']} + 2")["sum"] != begun["sum"]  # it plays, and something moves
    box = page.page.locator(f"{PANEL} canvas").bounding_box()
    assert box["width"] > 150 and box["height"] > 150 and box["y"] > 0

    page.page.route("**/stillmotion/steer", answer_late)
    page.page.fill(f"{PANEL} input[type=text]", "a red circle moves up on a white background")
    page.page.press(f"{PANEL} input[type=text]", "Enter")
    told = wait(page, "s.told.includes('from block')")["told"]
    assert "latent frame" in told and told.endswith("a red circle moves up on a white background")
    page.page.get_by_role("button", name="Send").dispatch_event("click")
    wait(page, "s.told.includes('text')")  # an empty prompt is answered, not sent

    scrub = page.page.locator(f"{PANEL} input[type=range]")
    scrub.fill("3")
    paused = page.run_js(STATE)
    assert (paused["shown"], paused["playing"]) == (3, False)
    scrub.fill("7")
    moved = page.run_js(STATE)
    assert moved["shown"] == 7 and moved["sum"] != paused["sum"]
    page.page.get_by_title("Play or pause").dispatch_event("click")
    wait(page, "s.position > 8 && s.playing")

    page.page.get_by_role("button", name="Stop").dispatch_event("click")
    page.page.wait_for_function("() => window.ended")
    done = wait(page, "s.ended && s.status.startsWith('complete')")
    saved = page.run_js("() => Object.values(app.nodeOutputs).find(found => found.images).images[0]")
    with av.open(str(server.base / "output" / saved["subfolder"] / saved["filename"])) as video:
        assert sum(1 for _ in video.decode(video=0)) == done["total"] > 8
    assert page.page.get_by_role("button", name="Send").is_disabled()
    page.page.locator(f"{PANEL} canvas").wait_for(state="hidden")  # ComfyUI shows the saved video:
    page.page.wait_for_function("""name => [...document.querySelectorAll('video')].some(
        v => v.currentSrc.includes(name) && v.readyState >= 2 && v.videoWidth)""", arg=saved["filename"])


def test_the_panel_is_not_part_of_the_saved_graph(page):
    page.run_js("graph => app.loadApiJson(graph, 'test')", graph(length=0))
    before = page.run_js("async () => [await app.graphToPrompt()].map(p => [p.output, p.workflow.nodes.map("
                         "n => n.widgets_values)])")
    page.run()
    wait(page, "s.ended")
    assert page.run_js("async () => [await app.graphToPrompt()].map(p => [p.output, p.workflow.nodes.map("
                       "n => n.widgets_values)])")[0][0].keys() == before[0][0].keys()
    after = page.run_js("async () => (await app.graphToPrompt()).workflow.nodes.map(n => n.widgets_values)")
    sampler = next(i for i, values in enumerate(before[0][1]) if values and "video/live" in values)
    assert len(after[sampler]) == len(before[0][1][sampler])


def test_the_player_keeps_time_waits_and_goes_on_without_a_gap(page):
    """Blocks of 4 frames at 8 frames a second, the clock moved by hand: seconds -> frame shown."""
    assert page.run_js("""async () => {
        const { Player } = await import('/extensions/stillmotion/live.js');
        const image = document.createElement('canvas');
        const player = new Player(document.createElement('canvas'), () => {});
        Object.assign(player, { fps: 8, start() {} });
        const block = frame => player.add({ frame, count: 4, columns: 2, width: 8, height: 8, image });
        const shown = [], after = seconds => { player.advance(seconds); shown.push(player.shown); };
        block(0);
        after(0); after(0.125); after(0.25);
        block(4);                                  // in time
        after(0.125); after(0.25);
        after(0.75);                               // the end of what is there
        block(8);                                  // late: goes on with its first frame
        after(0); after(0.125);
        player.toggle(); after(1); player.toggle();  // paused
        player.ended = true;
        after(0.25); after(0.125);                 // to the end, and from the start again
        player.loop = false;
        after(1); after(1); after(1);
        player.toggle(); player.toggle();          // plays again
        after(0);
        return shown;
    }""") == [0, 1, 3, 4, 6, 7, 8, 9, 9, 11, 0, 8, 11, 11, 0]
