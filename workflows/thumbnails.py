"""Make the templates' thumbnails: run each workflow with the demo model and keep its video as a moving picture.

    python workflows/thumbnails.py [NAME ...]      only these workflows

Writes NAME.webp (moving, for ComfyUI's page) and NAME.jpg (its middle frame, for pages that show no other kind). The
given pictures and the title are shown with the video, on a colour of the template's own. Templates for real
checkpoints, whose files are not here, get a drawn picture instead of a result.
"""

import argparse
import colorsys
import io
import json
import math
import tempfile
import textwrap
from pathlib import Path

import runner  # noqa: F401  makes host, client, ... importable

import host

EDGE, SMALL, STRIP, MARGIN = 320, 84, 46, 8  # pixels: the picture, given pictures in it, the strip of text, around them
FRAME_MS = 125
GOLDEN = 0.618  # turn of the hue from one template to the next: neighbours look unlike
INK, EDGING = (245, 246, 248), (60, 64, 72)
CURVES = "PreviewImage"  # of a report: the picture it shows is worth more than the video
SUN, HILLS = (250, 222, 150), (0.5, 0.36, 0.24)  # brightness of the hills, from far to near


def tint(hue, saturation, value):
    """RGB bytes of a colour."""
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue % 1, saturation, value))


def compose(picture, given, title, hue):
    """One frame: the picture, small ones of what was given, and the title below, on a ground of this hue."""
    from PIL import Image, ImageDraw, ImageFont
    whole = Image.new("RGB", (EDGE, EDGE), tint(hue, 0.55, 0.42))
    height = EDGE - STRIP
    scale = min(EDGE / picture.width, height / picture.height)
    size = round(picture.width * scale), round(picture.height * scale)
    whole.paste(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS),
                ((EDGE - size[0]) // 2, (height - size[1]) // 2))
    draw = ImageDraw.Draw(whole)
    for i, small in enumerate(given):
        x, y = MARGIN + i * (SMALL + MARGIN), height - SMALL - MARGIN
        draw.rectangle((x - 3, y - 3, x + SMALL + 2, y + SMALL + 2), EDGING)
        whole.paste(small.convert("RGB").resize((SMALL, SMALL), Image.Resampling.LANCZOS), (x, y))
    lines = textwrap.wrap(title, 34)
    for number, words in enumerate(lines):
        y = height + STRIP / 2 + 20 * (number - (len(lines) - 1) / 2)
        draw.text((EDGE / 2, y), words, INK, ImageFont.load_default(17), "mm")
    return whole


def landscape(frame, frames, hue):
    """A drawn photo whose hills pass by, the nearest fastest."""
    from PIL import Image, ImageDraw
    photo = Image.new("RGB", (EDGE, EDGE - STRIP))
    draw = ImageDraw.Draw(photo)
    for y in range(photo.height):
        draw.line((0, y, EDGE, y), tint(hue + 0.25 * y / photo.height, 0.5, 0.55 + 0.4 * y / photo.height))
    draw.ellipse((210, 50, 262, 102), SUN)
    for depth, brightness in enumerate(HILLS):
        ridge = [2 * math.pi * (1 + depth) * (x / EDGE + frame / frames) for x in range(0, EDGE + 1, 4)]
        points = [(4 * i, 150 + 42 * depth - (26 - 6 * depth) * (math.sin(at) + 0.3 * math.sin(3 * at + depth)))
                  for i, at in enumerate(ridge)]
        draw.polygon([*points, (EDGE, EDGE), (0, EDGE)], tint(hue, 0.45, brightness))
    return photo


def drawn(title, hue):
    """Frames for a template whose checkpoint is not here."""
    return [compose(landscape(i, 16, hue), [landscape(0, 16, hue)], title, hue) for i in range(16)]


def result(job, outputs, fetch, title, hue):
    """Frames of a workflow that was run. fetch: turns an output entry into a list of pictures."""
    def shown(kind):
        return [picture for i, node in job.items() if node["class_type"] == kind
                for entry in outputs.get(i, {}).get("images", ()) for picture in fetch(entry)]

    video, curves = shown("Stillmotion_SaveVideo"), shown(CURVES)
    given = [open_example(node["inputs"]["image"]) for node in job.values() if node["class_type"] == "LoadImage"]
    if curves:  # the top of the report, with the video on it
        top = curves[0].crop((0, 0, curves[0].width, min(curves[0].height, curves[0].width * (EDGE - STRIP) // EDGE)))
        return [compose(top, [frame], title, hue) for frame in video]
    return [compose(frame, given, title, hue) for frame in video]


def open_example(name):
    from PIL import Image
    return Image.open(host.WORKFLOWS / "examples" / name)


def save(name, frames):
    frames[len(frames) // 2].save(host.WORKFLOWS / f"{name}.jpg", quality=88)
    frames[0].save(host.WORKFLOWS / f"{name}.webp", save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0,
                   quality=80, method=6)
    print(f"{name}.webp, {name}.jpg", flush=True)


def main():
    host.check_python()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a workflow (default: all)")
    names = parser.parse_args().names
    host.reexec()
    import imageio.v3 as imageio
    from client import Client
    from launch import Server
    from PIL import Image
    table = json.loads((host.PACK / "web" / "templates.json").read_text())
    with Server(host.find_host(), threads=1) as server, tempfile.TemporaryDirectory() as folder:
        client = Client(server.url, server)

        def fetch(entry):
            path = Path(folder) / entry["filename"]
            client.download(entry, path)
            if path.suffix == ".mp4":
                return [Image.fromarray(frame) for frame in imageio.imread(path, plugin="pyav")]
            return [Image.open(io.BytesIO(path.read_bytes()))]

        for image in (host.WORKFLOWS / "examples").glob("*.png"):
            client.upload(image.read_bytes(), image.name)
        for number, entry in enumerate(table):
            name, look = entry["name"], (entry["title"], GOLDEN * number)
            api = host.WORKFLOWS / "api" / f"{name}.json"
            if names and name not in names:
                continue
            if not api.exists():
                save(name, drawn(*look))
                continue
            job = json.loads(api.read_text())
            save(name, result(job, client.run(job), fetch, *look))


if __name__ == "__main__":
    main()
