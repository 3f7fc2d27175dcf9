"""Regenerate the README's two pictures: a video of the demo model, and the graph that made it.

    python tests/readme_pictures.py

The animate template is opened in ComfyUI's page (Chromium has to be on the path) and run. Writes
web/pages/animate.webp (start image and video side by side) and web/pages/graph.webp.
"""

import argparse
import io
import json
import shutil
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "workflows" / "runner")]

import host  # noqa: E402

TEMPLATE = host.WORKFLOWS / "animate.json"
START = host.WORKFLOWS / "examples" / "stillmotion_star.png"
PICTURES = host.PACK / "web" / "pages"
SAVER = "Stillmotion_SaveVideo"
SIDE, GAP = 288, 8  # pixels
WINDOW, SHARPNESS = {"width": 1600, "height": 1000}, 1.5
# on the page, with a margin
NODES_BOX = """() => {
    const {scale, offset} = app.canvas.ds, at = app.canvas.canvas.getBoundingClientRect();
    const boxes = app.graph._nodes.map(n => n.getBounding());
    const [left, top] = [0, 1].map(i => Math.min(...boxes.map(b => b[i])));
    const [right, bottom] = [0, 1].map(i => Math.max(...boxes.map(b => b[i] + b[i + 2])));
    return {x: at.x + (left + offset[0]) * scale - 20, y: at.y + (top + offset[1]) * scale - 20,
            width: (right - left) * scale + 40, height: (bottom - top) * scale + 40};
}"""
# the node draws the video only once it has loaded
SHOWN = """name => [...document.querySelectorAll("video")].some(
    v => v.currentSrc.includes(name) && v.readyState >= 2)"""


def run_in_page(page):
    """Open the template and run it; returns the video as an output entry of the server, and a PNG of the nodes."""
    page.load(json.loads(TEMPLATE.read_text()))
    saver, = [i for i, node in page.run_js("async () => Object.entries((await app.graphToPrompt()).output)")
              if node["class_type"] == SAVER]
    video, = page.run()[saver]["images"]
    page.page.wait_for_function(SHOWN, arg=video["filename"])
    page.run_js("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.page.wait_for_timeout(2000)  # wait for the view's animation
    # Smaller, so that the page's buttons around the canvas cover no node; then its message about the run goes away.
    page.run_js("""() => { const {ds, canvas} = app.canvas;
                   ds.changeScale(0.85 * ds.scale, [canvas.clientWidth / 2, canvas.clientHeight / 2]);
                   app.canvas.setDirty(true, true); }""")
    page.page.wait_for_function("() => !document.body.innerText.includes('completed')")
    page.page.wait_for_timeout(1000)
    return video, page.page.screenshot(clip=page.run_js(NODES_BOX))


def side_by_side(frames):
    """The start image next to each frame."""
    from PIL import Image
    start = Image.open(START).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    for frame in frames:
        picture = Image.new("RGB", (2 * SIDE + GAP, SIDE), "white")
        picture.paste(start, (0, 0))
        picture.paste(frame.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (SIDE + GAP, 0))
        yield picture


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    host.check_python()
    comfyui = host.reexec()
    import av
    from browser.conftest import BROWSERS, FLAGS, READY, SETTINGS, Page
    from client import Client
    from launch import Server
    from PIL import Image
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if chromium is None:
        sys.exit(f"error: no Chromium on the path (looked for {', '.join(BROWSERS)}).")
    with Server(host.Host(Path(sys.executable), comfyui), "cpu", threads=1) as server, sync_playwright() as tool:
        settings = server.base / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(SETTINGS))
        browser = tool.chromium.launch(executable_path=chromium, headless=True, args=FLAGS)
        tab = browser.new_page(viewport=WINDOW, device_scale_factor=SHARPNESS)
        tab.goto(server.url)
        tab.wait_for_function(READY, timeout=60000)
        video, screen = run_in_page(Page(tab))
        browser.close()
        path = server.base / "video.mp4"
        Client(server.url, server).download(video, path)
        with av.open(str(path)) as container:
            rate = container.streams.video[0].average_rate
            frames = [frame.to_image() for frame in container.decode(video=0)]
    first, *rest = side_by_side(frames)
    first.save(PICTURES / "animate.webp", save_all=True, append_images=rest, duration=round(1000 / rate), loop=0,
               quality=85, method=6)
    Image.open(io.BytesIO(screen)).convert("RGB").save(PICTURES / "graph.webp", quality=90, method=6)


if __name__ == "__main__":
    main()
