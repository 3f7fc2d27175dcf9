"""Image-Prompt Folder, and which folders the nodes may read."""
import os
from hashlib import sha256
from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io

from .pictures import PICTURES, open_start, picture_prompts, summary
from .saving import short_name
from .schema import schema
from .values import shown
from .video import hearing_cancel

DATA_SETS = "stillmotion_data_sets"  # key of extra_model_paths.yaml


def allowed_folder(name: str) -> str:
    """The folder on this machine: inside ComfyUI's input folder, or inside one that the owner lists under DATA_SETS.

    All others are refused with the same error, whether they exist or not, so that clients cannot probe the disk.
    """
    roots = [folder_paths.get_input_directory()]
    if DATA_SETS in folder_paths.folder_names_and_paths:
        roots += folder_paths.get_folder_paths(DATA_SETS)
    given = os.path.expanduser(name.strip())
    path = os.path.normpath(os.path.join(os.path.abspath(roots[0]), given))
    if not given or "\0" in given or not any(Path(path).is_relative_to(os.path.abspath(root)) for root in roots):
        raise ValueError(f"folder = {shown(name)} was given. Give the name of a folder inside ComfyUI's input "
                         "folder, or a path inside a folder that the owner of this ComfyUI lists in "
                         f"extra_model_paths.yaml as {DATA_SETS}.")
    if not os.path.isdir(path):  # also False for names that are too long
        raise ValueError(f"folder = {shown(name)} was given, and there is no folder {shown(path)}.")
    return path


def folder_state(name: str, depth: int = 3) -> str:
    """Changes when the folder's files change, down to `depth` levels; errors in the folder are reported when the node
    runs."""
    try:
        path = Path(allowed_folder(name))
        files = sorted((str(file), file.stat().st_mtime_ns, file.stat().st_size)
                       for level in range(depth) for file in path.glob("/".join("*" * (level + 1))) if file.is_file())
    except (ValueError, OSError) as error:
        return str(error)
    return sha256(repr(files).encode()).hexdigest()


class ImagePromptFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_ImagePromptFolder",
            display_name="Image-Prompt Folder",
            category="Stillmotion/video",
            description="Pictures of a folder with their prompts: one a run for a queue, or all as lists.",
            search_aliases=["image folder", "load images from folder", "batch", "prompts from file", "image list",
                            "directory"],
            inputs=[
                io.String.Input("folder", default="stillmotion_pictures",
                                tooltip="A folder inside ComfyUI's input folder, or a path in a folder that "
                                        f"extra_model_paths.yaml lists as {DATA_SETS}. cat.txt holds the prompt of "
                                        "cat.png; or prompts.txt holds one line a picture, or one line for all."),
                io.Int.Input("index", default=0, min=0, max=10 ** 7, control_after_generate=True,
                             tooltip="The first picture, counted from 0 in natural order (cat2 before cat10). With "
                                     "increment, every run of the queue takes the next one."),
                io.Int.Input("limit", default=1, min=0, max=10 ** 7,
                             tooltip="How many pictures from there. 1: one a run. More, or 0 for all: lists; the nodes "
                                     "behind run once for each picture, and all pictures are in memory."),
                io.String.Input("filter", default="",
                                tooltip="Only pictures so named, such as cat* or *.png. They are counted without the "
                                        "others. Empty: all."),
            ],
            outputs=[
                io.Image.Output(display_name="image", is_output_list=True, tooltip="The pictures, upright, in RGB."),
                io.String.Output(display_name="prompt", is_output_list=True, tooltip="For CLIP Text Encode."),
                io.String.Output(display_name="name", is_output_list=True,
                                 tooltip="Names of the pictures without suffix, for filename_prefix of Save Video."),
                io.Int.Output(display_name="count", tooltip="How many pictures there are: queue as many runs."),
                io.String.Output(display_name="summary", tooltip="Which files of the folder were left out, and why."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **inputs):
        return folder_state(folder, depth=1)

    @classmethod
    def execute(cls, folder, index, limit, filter) -> io.NodeOutput:
        found, left_out = picture_prompts(allowed_folder(folder), filter.strip())
        if not found:
            which = f" that fits filter = {shown(filter)}" if filter.strip() else ""
            raise ValueError(f"folder = {shown(folder)} has no picture with a prompt{which}. A picture ends in "
                             f"{', '.join(PICTURES)}; its prompt is in a .txt of the same name beside it, or in "
                             f"prompts.txt. {summary(left_out)}".rstrip())
        if index >= len(found):
            raise ValueError(f"index = {index} was given; the folder has the pictures 0 to {len(found) - 1}. The queue "
                             "is through, or set index to 0.")
        chosen = found[index:index + limit] if limit else found[index:]
        pictures = [torch.from_numpy(np.asarray(open_start(path), dtype=np.float32) / 255)[None]
                    for path, _ in hearing_cancel(chosen)]
        return io.NodeOutput(pictures, [prompt for _, prompt in chosen], [short_name(path.stem) for path, _ in chosen],
                             len(found), f"{len(found)} pictures\n{summary(left_out)}".strip())
