"""Stillmotion: image-to-video nodes for ComfyUI, and the same as a library.

    from stillmotion import DynamiCrafterImg2VideoPipeline, save_video
"""

WEB_DIRECTORY = "./web"
LIBRARY = ("DynamiCrafterImg2VideoPipeline", "VideoError", "save_video")

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint", *LIBRARY]


async def comfy_entrypoint():
    """Entry point that ComfyUI calls to get the pack's nodes."""
    from .nodes import comfy_entrypoint as entrypoint

    return await entrypoint()


def __getattr__(name):  # the library is imported on use: ComfyUI does not need it
    if name not in LIBRARY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .workflows.runner import library

    return getattr(library, name)
