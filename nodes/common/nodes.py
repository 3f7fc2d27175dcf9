"""Save Video: frames or a VIDEO to MP4, GIF or numbered PNGs that carry the workflow."""
from fractions import Fraction
from pathlib import Path

import folder_paths
from comfy.cli_args import args
from comfy_api.latest import InputImpl, Types, io, ui

from . import video as files
from .schema import schema
from .values import shown

EXTENSIONS = {"mp4": ".mp4", "gif": ".gif", "png frames": ""}


class SaveVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_SaveVideo",
            display_name="Save Video (MP4, GIF, frames)",
            category="Stillmotion/video",
            description="Saves frames as an MP4, a GIF or numbered PNGs in the output folder and shows the result. "
                        "Drop a saved MP4 or PNG on ComfyUI to get its workflow back.",
            search_aliases=["save mp4", "save gif", "gif", "export video", "video combine", "frames to video",
                            "png sequence"],
            advanced=["crf"],
            inputs=[
                io.Image.Input("images", optional=True,
                               tooltip="The frames to save, in order. Connect either this or video."),
                io.Video.Input("video", optional=True,
                               tooltip="A video to save; its own frame rate and sound are kept (sound in MP4 only). "
                                       "Connect either this or images."),
                io.String.Input("filename_prefix", default="video/Stillmotion",
                                tooltip="Folder and name inside ComfyUI's output folder; a number is added. "
                                        "%year%, %month%, %day%, %hour%, %minute%, %second%, %width%, %height% are "
                                        "filled in; in the page also %date:yyyy-MM-dd% and %Node.widget%."),
                io.Float.Input("fps", default=8.0, min=0.1, max=files.MAX_FPS, step=0.1,
                               tooltip="Frames shown a second. Used for images only; a GIF plays at most 50."),
                io.Combo.Input("format", options=list(files.FORMATS), default="mp4",
                               tooltip="mp4: H.264, plays everywhere; odd sizes gain one repeated row or column. "
                                       "gif: loops, 256 colours, no workflow inside. "
                                       "png frames: a folder of numbered pictures without loss."),
                io.Int.Input("crf", default=16, min=1, max=51,
                             tooltip="MP4 only: 1 is best, 16 looks lossless, 23 is small, 51 is worst."),
            ],
            outputs=[io.Video.Output(display_name="video", tooltip="The video as it came in, before compression, "
                                                                   "for nodes that go on with it.")],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, filename_prefix, fps, format, crf, images=None, video=None) -> io.NodeOutput:
        if (images is None) == (video is None):
            given = "neither images nor video is" if images is None else "both images and video are"
            raise ValueError(f"{given} connected; connect just one of them.")
        if format not in files.FORMATS:
            raise ValueError(f"format = {format!r} was given; allowed are {', '.join(files.FORMATS)}.")
        if video is None:
            parts = Types.VideoComponents(images=images, frame_rate=Fraction(fps).limit_denominator(1001))
            video = InputImpl.VideoFromComponents(parts)
        else:
            parts = video.get_components()
        height, width = parts.images.shape[1:3]
        path, subfolder = output_path(filename_prefix, width, height, EXTENSIONS[format])
        names = files.save_video(parts.images, path, parts.frame_rate, format, crf, workflow_tags(cls.hidden),
                                 parts.audio)
        if format == "png frames":
            subfolder = str(Path(subfolder) / path.name)
        shown = [ui.SavedResult(n, subfolder, io.FolderType.output) for n in names]
        # the page plays everything "animated" as a video, which a GIF is not
        return io.NodeOutput(video, ui={"images": shown, "animated": (format == "mp4",)})


def output_path(prefix: str, width: int, height: int, extension: str) -> tuple[Path, str]:
    """(next free path for `prefix` in the output folder, its subfolder there); OSError says what to do."""
    output = folder_paths.get_output_directory()
    with files.saving(Path(output, prefix)):
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, output, width, height)
    return Path(folder) / f"{name}_{counter:05}_{extension}", subfolder


def workflow_tags(hidden) -> dict:
    """The prompt and the page's workflow, one tag each, as core's savers write them; none if switched off."""
    if args.disable_metadata:
        return {}
    tags = dict(hidden.extra_pnginfo or {})
    if hidden.prompt is not None:
        tags["prompt"] = hidden.prompt
    return tags


def find_model(name, folders, builtin=()):
    """Path of the file `name` in the first of ComfyUI's model `folders` that has it.

    Only names that the folder lists are looked up: the host does not check those of a saved or written graph.
    Raises ValueError with the names that there are, those of the pack's own models (`builtin`) first.
    """
    held = {folder: folder_paths.get_filename_list(folder) for folder in folders}
    for folder, names in held.items():
        if name in names:
            return Path(folder_paths.get_full_path_or_raise(folder, name))
    places = " or ".join(f"models/{folder}" for folder in folders)
    known = dict.fromkeys([*builtin, *(name for names in held.values() for name in names)])
    raise ValueError(f"There is no file {shown(name)} in {places}. Choose one of: {', '.join(known) or 'none there'}.")
