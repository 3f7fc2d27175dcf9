"""Nodes of the DynamiCrafter family."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..common.files import read_checkpoint
from . import checkpoint as loader
from .config import VARIANTS

DEMO = Path(__file__).parents[1] / "demo" / "dynamicrafter_demo.safetensors"

# Shown by the node that needs the part, where a pruned file lacks it.
MISSING = {
    "clip": "This checkpoint holds no text encoder (it was pruned). Use core's Load CLIP with OpenCLIP ViT-H, the "
            "text encoder of Stable Diffusion 2.1, type stable_diffusion.",
    "clip_vision": "This checkpoint holds no vision tower (it was pruned). Use core's Load CLIP Vision with OpenCLIP "
                   "ViT-H/14 (LAION-2B).",
    "vae": "This checkpoint holds no VAE. Take the VAE of another DynamiCrafter checkpoint with a second Load "
           "DynamiCrafter; core's Load VAE does not know video latents.",
}


class LoadDynamiCrafter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Stillmotion_LoadDynamiCrafter",
            display_name="Load DynamiCrafter",
            category="Stillmotion/DynamiCrafter",
            description="Loads an image-to-video model of the DynamiCrafter family (official model.ckpt, pruned "
                        ".safetensors, or the small demo that comes with this pack).",
            inputs=[
                io.Combo.Input("checkpoint", options=["demo", *folder_paths.get_filename_list("checkpoints")],
                               tooltip="A file in models/checkpoints. demo is the small model that comes with this "
                                       "pack: moving shapes at 64x64, to try every workflow without a download."),
                io.Combo.Input("variant", options=["auto", *VARIANTS], default="auto",
                               tooltip="Read from the file with auto. Only 512 and 512_interp look the same: choose "
                                       "512_interp for the two-image model. Not used with a YAML or for demo."),
                io.Combo.Input("weight_dtype", options=list(loader.WEIGHT_DTYPES), default="auto",
                               tooltip="How weights are stored in memory. auto: as ComfyUI decides for this device. "
                                       "fp8_e4m3fn halves the memory of fp16 (the towers and VAE keep more)."),
                io.String.Input("yaml", default="",
                                tooltip="Only for models of other sizes: name of the official-format YAML, beside the "
                                        "checkpoint or in models/configs, with open_clip_config.json beside it where "
                                        "its towers are not known to open_clip. Empty for published models."),
            ],
            outputs=[
                io.Model.Output(tooltip="For DDIM Sampler (fixed) or any core sampler."),
                io.Clip.Output(tooltip="Text encoder, for CLIP Text Encode."),
                io.ClipVision.Output(tooltip="Image encoder, for DynamiCrafter Image to Video."),
                io.Vae.Output(tooltip="Encodes and decodes images and video latents."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        paths = _paths(inputs["checkpoint"], inputs["yaml"])
        return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths if path]

    @classmethod
    def execute(cls, checkpoint, variant, weight_dtype, yaml):
        path, yaml_path = _paths(checkpoint, yaml)
        parts = loader.load(read_checkpoint(path), variant, weight_dtype, yaml_path,
                            folder_paths.get_folder_paths("embeddings"))
        return io.NodeOutput(*(ExecutionBlocker(MISSING[field]) if part is None else part
                               for field, part in parts._asdict().items()))


def _paths(name, yaml):
    """Checkpoint and YAML (None where none is named) as paths; names are taken as relative to the model folders."""
    path = DEMO if name == "demo" else folder_paths.get_full_path("checkpoints", name)
    if path is None:
        known = ["demo", *folder_paths.get_filename_list("checkpoints")]
        raise ValueError(f"There is no checkpoint {name!r} in models/checkpoints. Choose one of: {', '.join(known)}.")
    path = Path(path)
    if not yaml:
        return path, None
    folders = [path.parent, *map(Path, folder_paths.get_folder_paths("configs"))]
    inside = not Path(yaml).anchor and ".." not in Path(yaml).parts
    for folder in folders:
        if inside and (folder / yaml).is_file():
            return path, folder / yaml
    raise ValueError(f"There is no YAML {yaml!r} in {' or '.join(map(str, folders))}. Put it there, or leave the "
                     "field empty for a published model.")
