"""Make the templates' thumbnails: run each workflow with the demo model and keep four frames of its video.

    python workflows/thumbnails.py [NAME ...]      only these workflows
"""

import argparse
import json
import tempfile
from pathlib import Path

import runner  # noqa: F401  makes host, client, ... importable

import host

FRAME, GAP = 192, 4  # pixels


def grid(frames):
    """Four of the frames [T, H, W, 3] in a 2 x 2 grid."""
    from PIL import Image
    edge = 2 * FRAME + 3 * GAP
    picture = Image.new("RGB", (edge, edge), (32, 32, 36))
    for i in range(4):
        frame = Image.fromarray(frames[i * (len(frames) - 1) // 3]).resize((FRAME, FRAME), Image.Resampling.BICUBIC)
        picture.paste(frame, (GAP + i % 2 * (FRAME + GAP), GAP + i // 2 * (FRAME + GAP)))
    return picture


def main():
    host.check_python()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a workflow (default: all that save a video)")
    names = parser.parse_args().names
    host.reexec()
    import imageio.v3 as imageio
    from client import Client
    from launch import Server
    with Server(host.find_host(), threads=1) as server, tempfile.TemporaryDirectory() as folder:
        client = Client(server.url, server)
        for image in (host.WORKFLOWS / "examples").glob("*.png"):
            client.upload(image.read_bytes(), image.name)
        for api in sorted((host.WORKFLOWS / "api").glob("*.json")):
            job = json.loads(api.read_text())
            savers = [i for i, node in job.items() if node["class_type"] == "Stillmotion_SaveVideo"]
            if not savers or names and api.stem not in names:
                continue
            video, = client.run(job)[savers[0]]["images"]
            client.download(video, Path(folder) / "video.mp4")
            frames = imageio.imread(Path(folder) / "video.mp4", plugin="pyav")
            grid(frames).save(host.WORKFLOWS / f"{api.stem}.jpg", quality=88)
            print(f"{api.stem}.jpg")


if __name__ == "__main__":
    main()
