"""Make the templates' pictures anew: every workflow is run with the demo model, four frames of its video are kept.

    python workflows/thumbnails.py [NAME ...]      only these workflows
"""

import json
import sys
import tempfile
from pathlib import Path

import runner  # noqa: F401  brings host, client, ... within reach

import host

FRAME, GAP = 192, 4  # pixels


def grid(frames):
    """Four of the frames [T, H, W, 3], two in a row."""
    from PIL import Image
    edge = 2 * FRAME + 3 * GAP
    picture = Image.new("RGB", (edge, edge), (32, 32, 36))
    for i in range(4):
        frame = Image.fromarray(frames[i * (len(frames) - 1) // 3]).resize((FRAME, FRAME), Image.Resampling.BICUBIC)
        picture.paste(frame, (GAP + i % 2 * (FRAME + GAP), GAP + i // 2 * (FRAME + GAP)))
    return picture


def main():
    host.check_python()
    host.reexec()
    import av
    from client import Client
    from launch import Server
    with Server(host.find_host(), threads=1) as server, tempfile.TemporaryDirectory() as folder:
        client = Client(server.url, server)
        for image in (host.WORKFLOWS / "examples").glob("*.png"):
            client.upload(image.read_bytes(), image.name)
        for api in sorted((host.WORKFLOWS / "api").glob("*.json")):
            job = json.loads(api.read_text())
            savers = [i for i, node in job.items() if node["class_type"] == "Stillmotion_SaveVideo"]
            if not savers or sys.argv[1:] and api.stem not in sys.argv[1:]:
                continue
            video, = client.run(job)[savers[0]]["images"]
            client.download(video, Path(folder) / "video.mp4")
            with av.open(str(Path(folder) / "video.mp4")) as container:
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            grid(frames).save(host.WORKFLOWS / f"{api.stem}.jpg", quality=88)
            print(f"{api.stem}.jpg")


if __name__ == "__main__":
    main()
