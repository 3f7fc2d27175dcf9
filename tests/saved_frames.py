"""Frames that a graph saves, without loss: x264 does not write the same picture twice."""
import io

import graph
import numpy as np
from PIL import Image

SAVER = "Stillmotion_SaveVideo"


def lossless_frames(client, job, progress=None):
    """Run the graph with PNG frames in place of its MP4; returns them as [T, H, W, 3] uint8."""
    saver = graph.find_node(job, SAVER)
    job[saver]["inputs"]["format"] = "png frames"
    frames = []
    for entry in client.run(job, progress=progress)[saver]["images"]:
        with client.view(entry) as answer:
            frames.append(np.array(Image.open(io.BytesIO(answer.read()))))
    return np.stack(frames)
