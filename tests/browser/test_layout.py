"""How the templates look when they are opened: listed with title and line, nothing overlaps, all of it on the screen,
the note legible. In the classic page and with Nodes 2.0."""
import json
import re
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[2]
TABLE = json.loads((PACK / "web" / "templates.json").read_text())
WINDOW = {"width": 1600, "height": 1000}
BARS = (56, 76, 0, 0)  # left, top, right, bottom: the page's own bars, in pixels
SMALLEST = {"litegraph": 9.0, "vue": 7.5}  # pixels on the screen, of a note's letters
OPEN = "async workflow => app.loadGraphData(workflow, true, true, 'test', {openSource: 'template'})"
# on the screen: left, top, right, bottom of each node; Nodes 2.0 tells the canvas the size of its elements
BOXES = """() => {
    const {scale, offset} = app.canvas.ds, at = app.canvas.canvas.getBoundingClientRect();
    return app.graph._nodes.map(node => {
        const [x, y, width, height] = node.getBounding();
        const left = at.x + (x + offset[0]) * scale, top = at.y + (y + offset[1]) * scale;
        return [node.type, [left, top, left + width * scale, top + height * scale]];
    });
}"""
NOTE = """() => {
    const note = [...document.querySelectorAll('.tiptap, .comfy-markdown-content')].at(-1);
    const letters = [...note.querySelectorAll('h1, h2, p, li')].map(
        line => parseFloat(getComputedStyle(line).fontSize) * app.canvas.ds.scale);
    return [Math.min(...letters), note.parentElement.scrollHeight - note.parentElement.clientHeight];
}"""
CARDS = """() => [...document.querySelectorAll('[data-testid^="template-workflow-"]')].map(
    card => [card.dataset.testid.replace('template-workflow-', ''), card.innerText])"""


# a card's picture as few pixels: [width of the file, pixels], null until it is shown
THUMBNAIL = """name => {
    const card = document.querySelector(`[data-testid="template-workflow-${name}"]`);
    card?.scrollIntoView({block: 'center'});  // it is loaded when it comes into view
    const image = card?.querySelector('img');
    if (!image?.complete || !image.naturalWidth || !image.getClientRects().length) return null;
    const pen = new OffscreenCanvas(16, 16).getContext('2d');
    pen.drawImage(image, 0, 0, 16, 16);
    return [image.naturalWidth, Array.from(pen.getImageData(0, 0, 16, 16).data)];
}"""


def settled(page):
    """The boxes when they no longer change: the view moves to the graph, pictures load."""
    boxes = None
    for _ in range(40):
        before, boxes = boxes, page.run_js(BOXES)
        if boxes == before:
            return boxes
        page.page.wait_for_timeout(500)
    raise AssertionError(f"the nodes still move: {before}, {boxes}")


@pytest.mark.parametrize("page", ["litegraph", "vue"], indirect=True)
def test_templates_open_without_overlap_and_on_the_screen(page, request):
    kind = request.node.callspec.params["page"]
    page.page.set_viewport_size(WINDOW)
    faults = []
    for name in (entry["name"] for entry in TABLE):
        page.run_js(OPEN, json.loads((PACK / "workflows" / f"{name}.json").read_text()))
        page.page.wait_for_function("() => document.querySelector('.tiptap h2, .comfy-markdown-content h2')")
        boxes = settled(page)
        faults += [f"{name}: {node} is off the screen" for node, (left, top, right, bottom) in boxes
                   if left < BARS[0] or top < BARS[1] or right > WINDOW["width"] or bottom > WINDOW["height"]]
        for i, (one, a) in enumerate(boxes):
            faults += [f"{name}: {one} and {other} overlap" for other, b in boxes[i + 1:]
                       if min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 1]
        smallest, hidden = page.run_js(NOTE)
        faults += [f"{name}: the note's letters are {smallest:.1f} pixels high"] * (smallest < SMALLEST[kind])
        faults += [f"{name}: {hidden} pixels of the note are hidden"] * (hidden > 2)
    assert faults == []


def open_list(page):
    """The page's own list of our templates."""
    page.page.get_by_role("button", name="Templates", exact=True).first.click()
    page.page.get_by_text("stillmotion", exact=True).first.click()
    page.page.wait_for_function(f"count => ({CARDS})().length >= count", arg=8)


def test_each_template_in_the_list_shows_a_thumbnail_of_its_own(page):
    open_list(page)
    found = {}
    for name in [entry["name"] for entry in TABLE]:
        page.page.wait_for_function(THUMBNAIL, arg=name)
        width, found[name] = page.run_js(THUMBNAIL, name)
        assert width >= 200, name
        for other, pixels in found.items():
            unlike = sum(abs(a - b) for a, b in zip(pixels, found[name])) / len(pixels)
            assert other == name or unlike > 1, f"{name} looks like {other}"  # of 255; titles and tints differ


def test_the_page_lists_the_templates_in_order_with_title_and_line(page):
    open_list(page)
    cards = page.run_js(CARDS)
    assert [name for name, _ in cards] == [entry["name"] for entry in TABLE][:len(cards)]
    assert [entry["title"] in text for (_, text), entry in zip(cards, TABLE)] == [True] * len(cards)
    lines = [re.sub("[-_]", " ", entry["description"]) in text for (_, text), entry in zip(cards, TABLE)]
    assert len(set(lines)) == 1  # newer pages show the lines elsewhere
