"""Nodes of the video U-Net family."""

from hashlib import sha256

import folder_paths
import node_helpers
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..common.demo import DYNAMICRAFTER_DEMOS, VIDEO_UNET, VIDEO_UNET_EARLY, other_encoders
from ..common.files import read_checkpoint
from ..common.nodes import find_model
from ..common.notes import say_on_node
from ..common.schema import schema
from ..common.vae import demo_vae, pixel_vae
from . import checkpoint as loader
from .base import ENCODER_SOURCES, VideoUNetModel
from .conditioning import GIVEN, clip_conditions

DEMOS = {"demo": VIDEO_UNET, "demo, early in training": VIDEO_UNET_EARLY}
FOLDERS = ("checkpoints", "diffusion_models")


class LoadVideoUNet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_LoadVideoUNet",
            display_name="Load Video U-Net",
            category="Stillmotion/Video U-Net",
            description="Loads a video U-Net that this pack trained: text to video, image to video, video prediction "
                        "and interpolation in one small model.",
            search_aliases=["text to video", "t2v", "image to video", "i2v", "load trained model", "load model"],
            advanced=["weight_dtype"],
            inputs=[
                io.Combo.Input("checkpoint", options=[*DEMOS, *_names()],
                               tooltip="A file in models/checkpoints or models/diffusion_models, written by Train "
                                       "Video Model. demo is the small model that comes with this pack: moving "
                                       "shapes, 16 frames of 96x96, with the CLIP and VAE of \"demo, 96x96\" in Load "
                                       "DynamiCrafter. demo, early in training: a tiny one after 1200 steps, to show "
                                       "what clipping of x0 does, with the CLIP and VAE of demo."),
                io.Combo.Input("weight_dtype", options=list(loader.WEIGHT_DTYPES), default="auto",
                               tooltip="How weights are kept in memory. auto: ComfyUI chooses for this device."),
                io.Vae.Input("vae", optional=True,
                             tooltip="The VAE that the model was trained with. Only needed for image VAEs of core's "
                                     "Load VAE, which take single images: the VAE output of this node takes clips."),
            ],
            outputs=[
                io.Model.Output(tooltip="For DDIM Sampler (fixed), KSampler or any core sampler."),
                io.Vae.Output(tooltip="For models in pixels the conversion to images, for models in latents the "
                                      "connected VAE, which now takes clips. For the demo use the VAE of Load "
                                      "DynamiCrafter with its checkpoint \"demo, 96x96\"."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        path = _path(inputs["checkpoint"])
        found = (str(path), path.stat().st_mtime_ns, path.stat().st_size)
        return sha256(repr(found).encode()).hexdigest()  # a digest: ComfyUI saves it in the metadata of the results

    @classmethod
    def execute(cls, checkpoint, weight_dtype, vae=None):
        model = loader.load(read_checkpoint(_path(checkpoint)), weight_dtype)
        config = model.model.video_unet
        if config.space == "pixels":
            if vae is not None:
                raise ValueError(f"{checkpoint} works in pixels and takes no VAE. Disconnect it, and decode with the "
                                 "VAE output of this node.")
            return io.NodeOutput(model, pixel_vae())
        if vae is None:
            demo = DYNAMICRAFTER_DEMOS.get(config.text_encoder)
            if demo:
                loader.preview_with(model, demo_vae(demo))
            return io.NodeOutput(model, ExecutionBlocker(
                f"{checkpoint} works in latents and holds no VAE. Use the one that it was trained with" + (
                    f": that of {ENCODER_SOURCES[config.text_encoder]}, unless another was given in training."
                    if demo else ".")))
        return io.NodeOutput(model, loader.preview_with(model, vae))


class VideoUNetConditions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_VideoUNetConditions",
            display_name="Video U-Net Conditions",
            category="Stillmotion/Video U-Net",
            description="Sets which frames are given (none, the first ones, or both ends) and makes the empty latent.",
            search_aliases=["text to video", "t2v", "image to video", "i2v", "predict video", "interpolate",
                            "in-between frames"],
            inputs=[
                io.Model.Input("model", tooltip="From Load Video U-Net: its sizes are read here."),
                io.Conditioning.Input("positive", tooltip="The prompt, from CLIP Text Encode with the text encoder "
                                                          "that the model was trained with."),
                io.Conditioning.Input("negative", tooltip="The negative prompt; the model was trained with an empty "
                                                          "one. Not used at cfg 1."),
                io.Combo.Input("given", options=list(GIVEN), default=GIVEN[0],
                               tooltip="none: a video from the prompt alone. first frames: continue one image, or the "
                                       "first frames of a clip. both ends: from the first of two images to the "
                                       "second."),
                io.Int.Input("width", default=0, min=0, max=4096, step=8,
                             tooltip="Pixels; 0: as the model was trained (demo: 96)."),
                io.Int.Input("height", default=0, min=0, max=4096, step=8,
                             tooltip="Pixels; 0: as the model was trained (demo: 96)."),
                io.Int.Input("frames", default=0, min=0, max=1024,
                             tooltip="Frames of the video, including the given ones; 0: as the model was trained "
                                     "(demo: 16). Other numbers work, but less well the more they differ."),
                io.Int.Input("batch_size", default=1, min=1, max=64,
                             tooltip="Videos made at once, each from its own noise."),
                io.Image.Input("images", optional=True,
                               tooltip="The given frames in order, for first frames; two for both ends. Scaled and "
                                       "cropped, never stretched."),
                io.Vae.Input("vae", optional=True,
                             tooltip="Encodes the images: the VAE that the model was trained with. Not needed without "
                                     "images."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="With the given frames, for the sampler."),
                io.Conditioning.Output(display_name="negative", tooltip="With the same frames, for guidance."),
                io.Latent.Output(tooltip="Empty latent [batch, channels, frames, height, width]."),
            ],
        )

    @classmethod
    def execute(cls, model, positive, negative, given, width, height, frames, batch_size, images=None, vae=None):
        if not isinstance(model.model, VideoUNetModel):
            raise ValueError(f"The model is {type(model.model).__name__}, not a video U-Net. Connect Load Video U-Net, "
                             "or use the conditioning node of that model.")
        say_on_node(other_encoders(model, positive))
        values, latent = clip_conditions(model.model.video_unet, vae, images, given, width, height, frames, batch_size)
        return io.NodeOutput(node_helpers.conditioning_set_values(positive, values),
                             node_helpers.conditioning_set_values(negative, values), {"samples": latent})


def _names():
    return sorted({name for folder in FOLDERS for name in folder_paths.get_filename_list(folder)})


def _path(name):
    if name in (*DEMOS,):
        return DEMOS[name]
    return find_model(name, FOLDERS, DEMOS)
