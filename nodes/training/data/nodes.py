"""Video Folder, Moving Shapes, Latent Shards, Prompt List and Clip of a Data Set."""
import torch
from comfy_api.latest import io

from ...common.drawing import as_images
from ...common.images import own_size, trained_size
from ...common.nodes_folder import DATA_SETS, allowed_folder, folder_state
from ...common.schema import schema
from ...common.video import hearing_cancel
from .clips import Clips, MovingShapes
from .folders import PROBLEMS, SIZES, VideoFolder
from .prompts import Prompts
from .shards import LatentShards
from .sheet import draw_sheet

DataSet = io.Custom("STILLMOTION_DATASET")
PREVIEWED = 4  # clips
OUTPUTS = [
    DataSet.Output(display_name="data_set", tooltip="For Train Video Model, or Clip of a Data Set."),
    io.String.Output(display_name="summary", tooltip="What the data set holds, and which clips were left out, why."),
    io.Image.Output(display_name="preview", tooltip="Its first clips as pictures."),
]
FRAMES = {"default": 16, "min": 1, "max": 1024}
EDGE = {"default": 64, "min": 16, "max": 4096, "step": 8}
# the frontend would draw a new seed after each run by default: a data set stays the same until it is changed
SEED = {"default": 0, "min": 0, "max": 0xffffffffffffffff, "control_after_generate": False}


def _with_preview(clips: Clips) -> io.NodeOutput:
    rows = []
    for i in hearing_cancel(range(min(PREVIEWED, len(clips)))):
        item = clips[i]
        rows.append((item["caption"], _frames(item)))
    return io.NodeOutput(clips, clips.summary(), as_images(draw_sheet(rows)))


def _frames(item: dict) -> torch.Tensor:
    """[T, H, W, 3] in 0..1"""
    return (item["video"].movedim(0, -1) / 2 + 0.5).clamp(0, 1)


class VideoFolderNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_VideoFolder",
            display_name="Video Folder",
            category="Stillmotion/training",
            description="A data set of clips from a folder: videos/ and captions/ with the same names.",
            search_aliases=["data set", "dataset", "load video folder", "captions", "train", "finetune"],
            advanced=["problems", "sizes", "mirror", "max_samples", "seed"],
            inputs=[
                io.String.Input("folder", tooltip="A folder inside ComfyUI's input folder, or a path in a folder that "
                                                  f"extra_model_paths.yaml lists as {DATA_SETS}. videos/cat.mp4 "
                                                  "belongs to captions/cat.txt; a folder of numbered images is a "
                                                  "clip too."),
                io.Int.Input("frames", **FRAMES, tooltip="Frames taken from each clip."),
                io.Int.Input("width", **EDGE, tooltip="Clips are resized and cropped at the middle, never stretched."),
                io.Int.Input("height", **EDGE, tooltip="Clips are resized and cropped at the middle, never stretched."),
                io.Int.Input("stride", default=0, min=0, max=64,
                             tooltip="0: frames evenly over the whole clip, whatever its length. Otherwise every n-th "
                                     "frame from a random place, which keeps the speed."),
                io.Combo.Input("problems", options=list(PROBLEMS), default="skip",
                               tooltip="Clips that are damaged, too short or without a caption. skip: left out and "
                                       "named in the summary; refuse: the node stops and names all of them."),
                io.Combo.Input("sizes", options=list(SIZES), default="any",
                               tooltip="any: clips of different sizes are fitted. same: a clip of another size than "
                                       "most is a problem."),
                io.Boolean.Input("mirror", default=False,
                                 tooltip="Mirror half of the clips; left and right are exchanged in their captions."),
                io.Int.Input("max_samples", default=0, min=0, max=10 ** 7, tooltip="Only the first clips; 0: all."),
                io.Int.Input("seed", **SEED,
                             tooltip="Of what is drawn at random: places, mirrored clips."),
            ],
            outputs=OUTPUTS,
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **inputs):
        return folder_state(folder)

    @classmethod
    def execute(cls, folder, frames, width, height, stride, problems, sizes, mirror, max_samples,
                seed) -> io.NodeOutput:
        return _with_preview(VideoFolder(allowed_folder(folder), frames, (height, width), stride=stride,
                                         problems=problems, sizes=sizes, mirror=mirror, max_samples=max_samples,
                                         seed=seed))


class MovingShapesNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_MovingShapes",
            display_name="Moving Shapes",
            category="Stillmotion/training",
            description="A data set that is drawn: one coloured shape moves left, right, up or down in each clip. "
                        "The 64x64 demo models were trained on it.",
            search_aliases=["data set", "dataset", "synthetic data", "toy data", "train"],
            inputs=[
                io.Int.Input("count", default=500, min=1, max=10 ** 6, tooltip="Number of clips."),
                io.Int.Input("frames", default=16, min=1, max=32, tooltip="Frames of each clip."),
                io.Int.Input("size", default=64, min=0, max=1024, step=8,
                             tooltip="Edge of the square frames; 0: the size of the model that the VAE belongs to."),
                io.Boolean.Input("held_out", default=False,
                                 tooltip="Draw combinations of shape, colour and direction, and a wording, that never "
                                         "occur otherwise: to test what was learned."),
                io.Int.Input("seed", **SEED,
                             tooltip="Another seed draws other clips; the same seed the same."),
                io.Vae.Input("vae", optional=True, tooltip="Only for size 0: the VAE that came with the model."),
            ],
            outputs=OUTPUTS,
        )

    @classmethod
    def execute(cls, count, frames, size, held_out, seed, vae=None) -> io.NodeOutput:
        width, height = own_size(size, size, trained_size(vae))
        return _with_preview(MovingShapes(count, frames, (height, width), held_out=held_out, seed=seed))


class LatentShardsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_LatentShards",
            display_name="Latent Shards",
            category="Stillmotion/training",
            description="A data set of clips that were encoded before, by `python workflows/data.py pack`. Needs the "
                        "package lmdb.",
            search_aliases=["data set", "dataset", "lmdb", "cached latents", "train"],
            advanced=["max_samples"],
            inputs=[
                io.String.Input("folder", tooltip="A folder inside ComfyUI's input folder, or a path in a folder that "
                                                  f"extra_model_paths.yaml lists as {DATA_SETS}."),
                io.Int.Input("max_samples", default=0, min=0, max=10 ** 7, tooltip="Only the first clips; 0: all."),
            ],
            outputs=OUTPUTS,
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **inputs):
        return folder_state(folder)

    @classmethod
    def execute(cls, folder, max_samples) -> io.NodeOutput:
        shards = LatentShards(allowed_folder(folder), max_samples=max_samples)
        items = [shards[i] for i in range(min(PREVIEWED, len(shards)))]
        rows = [(item["caption"], (item["reference"].movedim(0, -1)[None] / 2 + 0.5).clamp(0, 1)) for item in items]
        return io.NodeOutput(shards, shards.summary(), as_images(draw_sheet(rows)))


class PromptList(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_PromptList",
            display_name="Prompt List",
            category="Stillmotion/training",
            description="A data set of prompts alone, without clips: for text-to-video training on a model's own "
                        "videos (Self-Rollout).",
            search_aliases=["data set", "dataset", "prompts", "self forcing"],
            inputs=[
                io.String.Input("prompts", default="a red circle moves left\na blue square moves up", multiline=True,
                                tooltip="One prompt a line."),
                io.Int.Input("frames", default=81, min=1, max=1024, tooltip="Frames of the videos to make."),
                io.Int.Input("width", **{**EDGE, "default": 832}, tooltip="Of the videos to make."),
                io.Int.Input("height", **{**EDGE, "default": 480}, tooltip="Of the videos to make."),
            ],
            outputs=OUTPUTS[:2],
        )

    @classmethod
    def execute(cls, prompts, frames, width, height) -> io.NodeOutput:
        made = Prompts(prompts.splitlines(), frames, (height, width))
        return io.NodeOutput(made, made.summary())


class DataSetClip(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_DataSetClip",
            display_name="Clip of a Data Set",
            category="Stillmotion/training",
            description="The frames and the caption of one clip: to look at it, to start from it, or as the truth that "
                        "a result is measured against.",
            search_aliases=["dataset item", "show clip", "preview data set", "ground truth"],
            inputs=[
                DataSet.Input("data_set", tooltip="From Video Folder or Moving Shapes."),
                io.Int.Input("index", default=0, min=0, max=10 ** 7, tooltip="Number of the clip, from 0."),
            ],
            outputs=[
                io.Image.Output(display_name="frames", tooltip="The frames of the clip, in order."),
                io.String.Output(display_name="caption", tooltip="For CLIP Text Encode."),
                io.String.Output(display_name="name", tooltip="Its file, or its number."),
            ],
        )

    @classmethod
    def execute(cls, data_set, index) -> io.NodeOutput:
        if not isinstance(data_set, Clips):
            raise ValueError("these clips are packed latents without frames; connect the data set that they were "
                             "packed from.")
        if not 0 <= index < len(data_set):
            raise ValueError(f"index = {index} was given; the data set has the clips 0 to {len(data_set) - 1}.")
        item = data_set[index]
        return io.NodeOutput(_frames(item), item["caption"], item["name"])
