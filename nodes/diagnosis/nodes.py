"""Diagnose Video Model."""
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ..common.drawing import as_images
from ..common.preview import step_preview
from ..common.schema import schema
from ..ddim.sampler import own_settings
from ..ddim.step import CLIP_MODES
from .plot import draw_diagnosis
from .run import DEPTHS, Request, diagnose

FOLDERS = ("checkpoints", "diffusion_models")


class DiagnoseModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        files = [name for folder in FOLDERS for name in folder_paths.get_filename_list(folder)]
        return schema(
            node_id="Stillmotion_DiagnoseModel",
            display_name="Diagnose Video Model",
            category="Stillmotion/sampling",
            description="Samples a few steps and reports whether model, inputs, VAE and result look right: good, "
                        "doubtful or bad, with the reason and what to try.",
            search_aliases=["debug model", "check model", "nan", "black video", "noise video", "ema"],
            advanced=["clip_x0", "clip_value", "compare_clipping"],
            inputs=[
                io.Model.Input("model", tooltip="Any eps or v video model with 1000 timesteps."),
                io.Conditioning.Input("positive", tooltip="As for the sampler."),
                io.Conditioning.Input("negative", tooltip="As for the sampler."),
                io.Latent.Input("latent", tooltip="As for the sampler: the empty latent, or a video latent."),
                io.Vae.Input("vae", tooltip="Decodes the result; it is also tested by encoding and decoding a "
                                            "picture."),
                io.Int.Input("seed", default=123, min=0, max=0xffffffffffffffff, control_after_generate=True,
                             tooltip="Seed of the noise, drawn on the CPU."),
                io.Int.Input("steps", default=8, min=1, max=1000,
                             tooltip="Sampling steps, without added noise (eta 0). A few reveal most faults; 20 show "
                                     "how good the result can be."),
                io.Float.Input("cfg", default=-1.0, min=-1.0, max=100.0, step=0.1,
                               tooltip="Guidance strength, as in the sampler. -1: the model's own."),
                io.Combo.Input("clip_x0", options=list(CLIP_MODES), default="off",
                               tooltip="Clipping of the predicted clean latent, as in the sampler."),
                io.Float.Input("clip_value", default=3.0, min=0.1, max=100.0, step=0.1,
                               tooltip="Limit for clip_x0, and for what counts as out of range."),
                io.Combo.Input("depth", options=list(DEPTHS), default="detailed",
                               tooltip="quick: inputs, sampling and result. detailed: also the norms of all "
                                       "parameters, the VAE's weights and round trip, and EMA weights."),
                io.Boolean.Input("compare_clipping", default=False,
                                 tooltip="Sample again with clipping off (or static, if clip_x0 is off) and report the "
                                         "effect of clipping, in dB if reference is the true clip."),
                io.Combo.Input("checkpoint", options=["none", *files], default="none",
                               tooltip="The model's file: its averaged (EMA) weights are compared with the raw ones. "
                                       "none: skip this check."),
                io.Image.Input("reference", optional=True,
                               tooltip="The start image, whose brightness and contrast are then taken as usual, or the "
                                       "true clip, with which the result is then compared in dB."),
            ],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="All findings, and the sampling report."),
                io.String.Output(display_name="report", tooltip="The same as text, with the figures of each step."),
                io.String.Output(display_name="verdict", tooltip="good, doubtful or bad: the worst finding."),
                io.Image.Output(display_name="frames", tooltip="The sampled frames; one grey frame if bad inputs "
                                                               "prevented sampling."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, vae, seed, steps, cfg, clip_x0, clip_value, depth,
                compare_clipping, checkpoint, reference=None) -> io.NodeOutput:
        _, cfg = own_settings(model, steps, cfg)
        request = Request(seed, steps, cfg, clip_x0, clip_value, depth, compare_clipping, _path(checkpoint))
        found, frames = diagnose(model, positive, negative, latent, vae, request, reference,
                                 step_preview(model, steps))
        if frames is None:
            frames = torch.full((1, 64, 64, 3), 0.5)
        return io.NodeOutput(as_images(draw_diagnosis(found)), found.text(), found.level, frames,
                             ui={"diagnosis": [found.data()]})


def _path(name):
    if name == "none":
        return None
    for folder in FOLDERS:
        path = folder_paths.get_full_path(folder, name)
        if path:
            return Path(path)
    raise ValueError(f"There is no file {name!r} in models/{' or models/'.join(FOLDERS)}. Choose none or a name from "
                     "the list.")
