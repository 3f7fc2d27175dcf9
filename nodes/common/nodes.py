"""Save Video: frames or a VIDEO to MP4, GIF or numbered PNGs with the workflow embedded."""
import os
from pathlib import Path

import folder_paths
from comfy.cli_args import args
from comfy_api.latest import InputImpl, Types, io, ui

from . import video as files
from .saving import NewName, new_file, saving
from .schema import schema
from .values import check_path, shown

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
                io.Latent.Input("latent", optional=True,
                                tooltip="The latent that the images were decoded from: each clip of a batch then "
                                        "becomes a file of its own. Left open, all images are one video."),
            ],
            outputs=[io.Video.Output(display_name="video", tooltip="The video as it came in, before compression, "
                                                                   "for nodes that go on with it.")],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, filename_prefix, fps, format, crf, images=None, video=None, latent=None) -> io.NodeOutput:
        if (images is None) == (video is None):
            given = "neither images nor video is" if images is None else "both images and video are"
            raise ValueError(f"{given} connected; connect just one of them.")
        if latent is not None and images is None:
            raise ValueError("a latent is connected beside a video. It tells the clips among images; a video is one "
                             "clip: disconnect the latent.")
        files.check_format(format)
        if video is None:
            parts = Types.VideoComponents(images=images, frame_rate=files.frame_rate(fps, format))
            video = InputImpl.VideoFromComponents(parts)
        else:
            parts = video.get_components()
        saved = []
        for clip_NHWC in clips_of(parts.images, latent):
            name, subfolder = output_name(filename_prefix, *clip_NHWC.shape[2:0:-1], EXTENSIONS[format])
            with new_file(name) as content, saving(name.path):
                names = files.write_video(content, clip_NHWC, parts.frame_rate, format, crf,
                                          workflow_tags(cls.hidden), parts.audio)
            if names:  # a folder of frames
                subfolder = str(Path(subfolder) / name.path.name)
            saved += [ui.SavedResult(n, subfolder, io.FolderType.output) for n in names or [name.path.name]]
        # the frontend plays everything marked "animated" as a video, which does not work for a GIF
        return io.NodeOutput(video, ui={"images": saved, "animated": (format == "mp4",)})


def clips_of(images_NHWC, latent):
    """Split consecutive frames into clips [T, H, W, C]: as many as the video LATENT's batch size, if there is one."""
    if latent is None or latent["samples"].ndim != 5:
        return [images_NHWC]
    clips = len(latent["samples"])
    if not clips or len(images_NHWC) % clips:
        raise ValueError(f"{len(images_NHWC)} frames were given with a latent of {clips} clips, which would not be "
                         "equally long. Connect the latent that the frames were decoded from, or none to save all "
                         "frames as one video.")
    return images_NHWC.chunk(clips)


def output_name(prefix: str, width: int, height: int, extension: str) -> tuple[NewName, str]:
    """(name for a new result of `prefix` in the output folder, its subfolder there).

    A prefix that ends in a folder gets the file name Stillmotion. Raises ValueError for a prefix that is not a valid
    file name or lies outside the output folder, and OSError with a message that says what to do.
    """
    output = folder_paths.get_output_directory()
    if os.path.basename(prefix) in ("", ".", ".."):
        prefix = os.path.join(prefix, "Stillmotion")
    check_path("filename_prefix", prefix)
    if not os.path.abspath(os.path.join(output, prefix)).startswith(os.path.join(os.path.abspath(output), "")):
        raise ValueError(f"filename_prefix is {shown(prefix)}, which lies outside the output folder: give a folder and "
                         "name inside it, such as video/cat.")
    with saving(Path(output, prefix)):
        folder, name, number, subfolder, _ = folder_paths.get_save_image_path(prefix, output, width, height)
    return NewName(Path(folder), name, number, extension), subfolder


def workflow_tags(hidden) -> dict:
    """The prompt and the frontend's workflow, one tag each, as core's save nodes write them; empty if disabled.

    Without ComfyUI's mark `is_changed`, which depends on the folders of the server: the same job gives the same file
    on every server.
    """
    if args.disable_metadata:
        return {}
    tags = dict(hidden.extra_pnginfo or {})
    if hidden.prompt is not None:
        tags["prompt"] = {node: {key: value for key, value in entry.items() if key != "is_changed"}
                          for node, entry in hidden.prompt.items()}
    return tags


def find_model(name, folders, builtin=()):
    """Path of the file `name` in the first of ComfyUI's model `folders` that contains it.

    Only listed names are accepted: ComfyUI does not check names in a saved or hand-written graph.
    Raises ValueError with the available names, those of the pack's own models (`builtin`) first.
    """
    held = {folder: folder_paths.get_filename_list(folder) for folder in folders}
    for folder, names in held.items():
        if name in names:
            return Path(folder_paths.get_full_path_or_raise(folder, name))
    places = " or ".join(f"models/{folder}" for folder in folders)
    known = dict.fromkeys([*builtin, *(name for names in held.values() for name in names)])
    raise ValueError(f"There is no file {shown(name)} in {places}. Choose one of: {', '.join(known) or 'none there'}.")
