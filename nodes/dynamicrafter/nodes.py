"""Nodes of the DynamiCrafter family."""

import os
from hashlib import sha256
from pathlib import Path

import folder_paths
import node_helpers
import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..common.core_model import WEIGHT_DTYPES
from ..common.demo import DYNAMICRAFTER_DEMOS
from ..common.files import read_checkpoint
from ..common.images import own_size, trained_size
from ..common.nodes import find_model
from ..common.notes import say_on_node
from ..common.schema import schema
from ..common.values import shown
from . import checkpoint as loader
from .conditioning import MODES, image_conditions, strangeness
from .config import VARIANTS

# Shown by the node that needs a part which a pruned file lacks.
MISSING = {
    "clip": "This checkpoint holds no text encoder (it was pruned). Use core's Load CLIP with OpenCLIP ViT-H, the "
            "text encoder of Stable Diffusion 2.1, type stable_diffusion.",
    "clip_vision": "This checkpoint holds no vision tower (it was pruned). Use core's Load CLIP Vision with OpenCLIP "
                   "ViT-H/14 (LAION-2B).",
    "vae": "This checkpoint holds no VAE. Use the VAE of another DynamiCrafter checkpoint with a second Load "
           "DynamiCrafter; core's Load VAE does not take video latents.",
}


class LoadDynamiCrafter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_LoadDynamiCrafter",
            display_name="Load DynamiCrafter",
            category="Stillmotion/DynamiCrafter",
            description="Loads an image-to-video model of the DynamiCrafter family (official model.ckpt, pruned "
                        ".safetensors, or a small demo that comes with this pack).",
            search_aliases=["image to video", "i2v", "animate", "dynamicrafter checkpoint", "load model"],
            advanced=["weight_dtype", "yaml"],
            inputs=[
                io.Combo.Input("checkpoint",
                               options=[*DYNAMICRAFTER_DEMOS, *folder_paths.get_filename_list("checkpoints")],
                               tooltip="A file in models/checkpoints. Two small models come with this pack, to try "
                                       "every workflow without a download. demo, 96x96: patterned shapes and camera "
                                       "moves; the demos of Load Causal Wan and Load Video U-Net use its VAE and CLIP. "
                                       "demo: plain shapes at 64x64."),
                io.Combo.Input("variant", options=["auto", *VARIANTS], default="auto",
                               tooltip="auto reads it from the file. Only 512 and 512_interp have the same keys: "
                                       "choose 512_interp for the two-image model. Not used with a YAML or for the "
                                       "demos."),
                io.Combo.Input("weight_dtype", options=list(WEIGHT_DTYPES), default="auto",
                               tooltip="How weights are kept in memory. auto: ComfyUI chooses for this device. "
                                       "fp8_e4m3fn halves the memory of fp16 (not for towers and VAE)."),
                io.String.Input("yaml", default="",
                                tooltip="Only for models of other sizes: name of the official-format YAML, next to the "
                                        "checkpoint or in models/configs, with open_clip_config.json next to it if "
                                        "open_clip does not have its towers. Empty for published models."),
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
        files = [(str(path), path.stat().st_mtime_ns, path.stat().st_size)
                 for path in _paths(inputs["checkpoint"], inputs["yaml"]) if path]
        return sha256(repr(files).encode()).hexdigest()  # a digest: ComfyUI saves it in the metadata of the results

    @classmethod
    def execute(cls, checkpoint, variant, weight_dtype, yaml):
        path, yaml_path = _paths(checkpoint, yaml)
        parts = loader.load(read_checkpoint(path), variant, weight_dtype, yaml_path,
                            folder_paths.get_folder_paths("embeddings"))
        return io.NodeOutput(*(ExecutionBlocker(MISSING[field]) if part is None else part
                               for field, part in parts._asdict().items()))


class DynamiCrafterImageToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_DynamiCrafterImageToVideo",
            display_name="DynamiCrafter Image to Video",
            category="Stillmotion/DynamiCrafter",
            description="Adds the start image (and the end image) to the conditioning and makes the empty latent.",
            search_aliases=["image to video", "img2vid", "i2v", "animate", "interpolate", "in-between frames",
                            "loop"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="The prompt, from CLIP Text Encode. Any length."),
                io.Conditioning.Input("negative", tooltip="The negative prompt; an empty one is the official setting."),
                io.ClipVision.Input("clip_vision", tooltip="From Load DynamiCrafter, or core's Load CLIP Vision with "
                                                           "OpenCLIP ViT-H for a pruned checkpoint."),
                io.Vae.Input("vae", tooltip="From Load DynamiCrafter."),
                io.Image.Input("image", tooltip="The first frame. Scaled and cropped to the size, never stretched; the "
                                                "vision tower sees all of it. Several images make one clip each."),
                io.Combo.Input("mode", options=list(MODES), default="animate",
                               tooltip="animate: start from the image. interpolate: go from image to image2 (with the "
                                       "512_interp model). loop: return to the image, so that the video can repeat "
                                       "(512_interp too)."),
                io.Int.Input("width", default=0, min=0, max=4096, step=8,
                             tooltip="Pixels, a multiple of 8. 0: as in training (256, 512 or 1024; the demo's own). "
                                     "Other sizes work, best near that one."),
                io.Int.Input("height", default=0, min=0, max=4096, step=8,
                             tooltip="Pixels, a multiple of 8. 0: as in training (256, 320 or 576; the demo's own)."),
                io.Int.Input("frames", default=16, min=1, max=256,
                             tooltip="The models were trained with 16. Each frame has its own image tokens; for other "
                                     "numbers they are interpolated over time. 8 to 32 work; motion and sharpness fall "
                                     "off beyond. Memory grows with the number."),
                io.Int.Input("fs", default=0, min=0, max=60,
                             tooltip="Speed. 0: the model's default (256: 3, 512: 24, 512_interp: 5, 1024: 10). For "
                                     "256 it is the frame stride, 1 to 6: larger moves more. For all others it is the "
                                     "frames per second, 5 to 30: smaller moves more."),
                io.Int.Input("batch_size", default=1, min=1, max=64,
                             tooltip="Clips made at once from the image, each with its own noise."),
                io.Image.Input("image2", optional=True, tooltip="The last frame, for mode interpolate only."),
                io.Model.Input("model", optional=True,
                               tooltip="Only for a pruned checkpoint with the VAE of another one: width and height 0 "
                                       "then mean this model's size."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="With the image, for the sampler."),
                io.Conditioning.Output(display_name="negative", tooltip="With a grey image, for guidance."),
                io.Latent.Output(tooltip="Empty latent [batch, 4, frames, height / 8, width / 8]."),
            ],
        )

    @classmethod
    def execute(cls, positive, negative, clip_vision, vae, image, mode, width, height, frames, fs, batch_size,
                image2=None, model=None):
        known = trained_size(model and model.model, vae)
        width, height = own_size(width, height, known)
        say_on_node(strangeness(vae, image, width, height, known))
        latent, tokens, grey = image_conditions(clip_vision, vae, image, image2, mode, width, height, frames,
                                                batch_size)
        values = {"concat_latent_image": latent, "frame_stride": fs}
        positive = node_helpers.conditioning_set_values(positive, {**values, "image_tokens": tokens})
        negative = node_helpers.conditioning_set_values(negative, {**values, "image_tokens": grey})
        return io.NodeOutput(positive, negative, {"samples": torch.zeros_like(latent)})


def _paths(name, yaml):
    """Checkpoint and YAML (None if not given) as paths; names are relative to the model folders."""
    path = DYNAMICRAFTER_DEMOS.get(name) or find_model(name, ("checkpoints",), list(DYNAMICRAFTER_DEMOS))
    if not yaml:
        return path, None
    folders = [path.parent, *map(Path, folder_paths.get_folder_paths("configs"))]
    inside = not Path(yaml).anchor and ".." not in Path(yaml).parts
    for folder in folders:
        if inside and os.path.isfile(folder / yaml):  # False for names that no file can have
            return path, folder / yaml
    raise ValueError(f"There is no YAML {shown(yaml)} in {' or '.join(map(str, folders))}. Put it there, or leave the "
                     "field empty for a published model.")
