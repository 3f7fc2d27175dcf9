"""Nodes of the causal Wan family."""

from hashlib import sha256

import folder_paths
import node_helpers
import torch
from comfy_api.latest import io

from ..common.core_model import WEIGHT_DTYPES
from ..common.demo import CAUSAL_WAN
from ..common.files import read_checkpoint
from ..common.images import own_size, trained_size
from ..common.nodes import find_model
from ..common.schema import schema
from . import checkpoint as loader
from .base import wan_params
from .conditioning import MECHANISMS, WAN_SIZE, image_conditions
from .lora import add_lora
from .nodes_sampling import Timeline
from .steering import encode_prompt
from .timeline import PromptTimeline, parse_timeline

FOLDERS = ("diffusion_models", "checkpoints")
GREY = (1, 64, 64, 3)  # the picture of an image-to-video model that is given none


class LoadCausalWan(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_LoadCausalWan",
            display_name="Load Causal Wan",
            category="Stillmotion/Causal Wan",
            description="Loads a causal Wan 2.1 model (Self-Forcing, Causal-Forcing, LongLive 1.0, CausVid, Krea "
                        "Realtime) for the Block-Autoregressive Sampler: .safetensors, or the original .pt.",
            search_aliases=["LongLive", "Self Forcing", "Causal Forcing", "CausVid", "Krea Realtime", "wan checkpoint",
                            "load model"],
            advanced=["weights", "weight_dtype"],
            inputs=[
                io.Combo.Input("checkpoint", options=["demo", *_names(FOLDERS)],
                               tooltip="A file in models/diffusion_models or models/checkpoints. It must be a causal "
                                       "model. Ordinary Wan has the same keys, so it loads with at most a warning in "
                                       "the log, but its videos fall apart from block to block. demo is the small "
                                       "model that comes with this pack."),
                io.Combo.Input("weights", options=list(loader.WEIGHTS), default="auto",
                               tooltip="For .pt files that hold two sets of weights. ema: averaged (Self-Forcing, "
                                       "frame-wise and long Causal-Forcing). raw: as trained (chunk-wise "
                                       "Causal-Forcing). auto: what the authors use; the log says which."),
                io.Combo.Input("lora", options=["none", *_names(("loras",))], default="none",
                               tooltip="A file in models/loras, including LongLive's lora.pt as published (LongLive "
                                       "needs it with longlive_base.pt). For more LoRAs use core's LoRA loaders."),
                io.Float.Input("lora_strength", default=1.0, min=-20.0, max=20.0, step=0.01,
                               tooltip="1 is as trained. If a LoRA was trained with an alpha other than its rank and "
                                       "the file does not say so, set this to alpha / rank."),
                io.Combo.Input("weight_dtype", options=list(WEIGHT_DTYPES), default="auto",
                               tooltip="How weights are kept in memory. auto: ComfyUI chooses for this device. "
                                       "fp8_e4m3fn: matrices in 8 bits, half the memory of bf16."),
            ],
            outputs=[io.Model.Output(tooltip="For Block-Autoregressive Sampler. Text, VAE and image encoder come from "
                                             "core's loaders: UMT5-XXL, Wan 2.1 VAE, CLIP ViT-H.")],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        files = [(str(path), path.stat().st_mtime_ns, path.stat().st_size)
                 for path in _paths(inputs["checkpoint"], inputs["lora"]) if path]
        return sha256(repr(files).encode()).hexdigest()  # hashed: ComfyUI saves it in the metadata of the results

    @classmethod
    def execute(cls, checkpoint, weights, lora, lora_strength, weight_dtype):
        path, lora_path = _paths(checkpoint, lora)
        model = loader.load(read_checkpoint(path), weights, weight_dtype)
        if lora_path:
            model = add_lora(model, read_checkpoint(lora_path), lora_strength)
        return io.NodeOutput(model)


class CausalWanImageToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_CausalWanImageToVideo",
            display_name="Causal Wan Image to Video",
            category="Stillmotion/Causal Wan",
            description="Starts a video from an image, continues the frames of a clip, or starts from text alone, for "
                        "the Block-Autoregressive Sampler.",
            search_aliases=["image to video", "i2v", "text to video", "t2v", "animate", "extend video",
                            "continue video", "LongLive", "Self Forcing"],
            advanced=["mechanism", "short_last_block"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="The prompt, from CLIP Text Encode."),
                io.Conditioning.Input("negative", tooltip="The negative prompt; used if cfg is not 1."),
                io.Vae.Input("vae", tooltip="From core's Load VAE (Wan 2.1), or the demo's."),
                io.Image.Input("image", optional=True,
                               tooltip="The start image, or the last frames of a clip in order: with Wan's VAE 1, 5, "
                                       "9, ... frames. Scaled and cropped, never stretched. Not connected: text to "
                                       "video."),
                io.Int.Input("width", default=0, min=0, max=4096, step=16,
                             tooltip="Pixels, a multiple of 16. 0: as in training, 832 with Wan's VAE."),
                io.Int.Input("height", default=0, min=0, max=4096, step=16,
                             tooltip="Pixels, a multiple of 16. 0: as in training, 480 with Wan's VAE."),
                io.Int.Input("length", default=73, min=2, max=100000,
                             tooltip="Video frames, including the given ones. Wan's VAE makes 4 of each latent frame "
                                     "after the first. With blocks of 3: 73, 85, 97, ... For a number that does not "
                                     "fit, the error lists those that do."),
                io.Int.Input("block", default=3, min=1, max=64,
                             tooltip="Latent frames that the model makes at once: 3 (chunk-wise models: Self-Forcing, "
                                     "LongLive, Krea) or 1 (frame-wise Causal-Forcing). Same value as in the sampler."),
                io.Combo.Input("mechanism", options=list(MECHANISMS), default="auto",
                               tooltip="How the image is given to the model. prefix frame: a block of its own, for "
                                       "frame-wise models. still chunk: the image repeated for one block, cut off "
                                       "afterwards, for chunk-wise models. in-block clamp: held inside the first "
                                       "block. concat: image-to-video models only. auto: concat for image-to-video "
                                       "models (detected from model, or from image tokens), otherwise depending on "
                                       "block."),
                io.Boolean.Input("short_last_block", default=False,
                                 tooltip="Allow a length that ends inside a block. Set it in the sampler too."),
                io.Int.Input("batch_size", default=1, min=1, max=64,
                             tooltip="Videos made at once, each with its own noise."),
                io.ClipVisionOutput.Input("clip_vision_output", optional=True,
                                          tooltip="Image tokens, from CLIP Vision Encode. Image-to-video models need "
                                                  "them (without an image: those of a grey picture). Do not connect "
                                                  "it for text-to-video models."),
                io.Model.Input("model", optional=True,
                               tooltip="The model to sample with: auto then chooses the mechanism for it."),
                io.ClipVision.Input("clip_vision", optional=True,
                                    tooltip="The vision tower of an image-to-video model, in place of "
                                            "clip_vision_output: encodes the first image, or plain grey without "
                                            "one. Do not connect it for text-to-video models."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="With the image, for the sampler."),
                io.Conditioning.Output(display_name="negative", tooltip="With the image, for guidance."),
                io.Latent.Output(tooltip="Starts with the given frames; for Block-Autoregressive Sampler only."),
            ],
        )

    @classmethod
    def execute(cls, positive, negative, vae, width, height, length, block, mechanism, short_last_block, batch_size,
                image=None, clip_vision_output=None, model=None, clip_vision=None):
        if clip_vision is not None and clip_vision_output is None:
            clip_vision_output = clip_vision.encode_image(torch.full(GREY, 128 / 255) if image is None else image[:1])
        i2v = clip_vision_output is not None if model is None else wan_params(model).i2v
        width, height = own_size(width, height, trained_size(vae) or WAN_SIZE)
        entries, latent = image_conditions(vae, image, width, height, length, block, mechanism, i2v, short_last_block,
                                           batch_size)
        if clip_vision_output is not None:
            entries["clip_vision_output"] = clip_vision_output
        return io.NodeOutput(node_helpers.conditioning_set_values(positive, entries),
                             node_helpers.conditioning_set_values(negative, entries), latent)


class PromptTimelineNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_PromptTimeline",
            display_name="Prompt Timeline",
            category="Stillmotion/Causal Wan",
            description="Prompts that follow one another in one video.",
            search_aliases=["prompt schedule", "prompt travel", "prompt switch", "multi prompt", "LongLive"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model: UMT5-XXL for Wan 2.1."),
                io.String.Input("prompts", multiline=True, default="0: a circle moves left\n12: a circle moves up",
                                tooltip="One 'start frame: prompt' per line, in order. Start frames count latent "
                                        "frames (with Wan's VAE 4 video frames each) from 0; a prompt takes effect at "
                                        "the next block. Before the first line's frame the sampler's positive prompt "
                                        "is used."),
            ],
            outputs=[Timeline.Output(display_name="timeline", tooltip="For Block-Autoregressive Sampler.")],
        )

    @classmethod
    def execute(cls, clip, prompts):
        entries = parse_timeline(prompts)
        return io.NodeOutput(PromptTimeline(
            tuple(start for start, _ in entries),
            tuple(encode_prompt(clip, prompt) for _, prompt in entries)))


def _names(folders):
    return list(dict.fromkeys(name for folder in folders for name in folder_paths.get_filename_list(folder)))


def _paths(checkpoint, lora):
    """Checkpoint and LoRA (None if not given) as paths."""
    return (CAUSAL_WAN if checkpoint == "demo" else find_model(checkpoint, FOLDERS, ["demo"]),
            None if lora == "none" else find_model(lora, ("loras",)))
