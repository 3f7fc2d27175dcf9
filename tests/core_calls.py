"""Calls into core that work in every release, and helpers to read what graphs save."""
from io import BytesIO

import graph
import numpy as np
from comfy import sd
from comfy_api.latest import io
from comfy_api.latest._io import HiddenHolder
from PIL import Image
from safetensors.torch import load_file

SAVER = "Stillmotion_SaveVideo"


def with_hidden(node, prompt, extra_pnginfo):
    """A node class prepared as ComfyUI executes it, with its hidden inputs."""
    hidden = HiddenHolder.from_dict({io.Hidden.prompt: prompt, io.Hidden.extra_pnginfo: extra_pnginfo})
    return type(node.__name__, (node,), {"hidden": hidden})


def saved_by_core(model, path):
    """The tensors that core's Save Checkpoint writes for a MODEL."""
    sd.save_checkpoint(str(path), model)
    return load_file(path)


def lossless_frames(client, job, progress=None):
    """Run the graph with PNG frames instead of its MP4, because x264 output is not deterministic.

    Returns the frames as [T, H, W, 3] uint8.
    """
    saver = graph.find_node(job, SAVER)
    job[saver]["inputs"]["format"] = "png frames"
    frames = []
    for entry in client.run(job, progress=progress)[saver]["images"]:
        with client.view(entry) as answer:
            frames.append(np.array(Image.open(BytesIO(answer.read()))))
    return np.stack(frames)
