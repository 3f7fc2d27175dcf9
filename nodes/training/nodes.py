"""Train Video Model."""
import time
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io, ui

from ..causal_wan.lora import add_lora
from ..common.drawing import as_images
from ..common.files import read_checkpoint
from ..common.schema import schema
from ..common.values import shown
from .config import PARTS, TrainConfig
from .curves import draw_curves, read_curves
from .data.clips import Clips
from .data.prompts import Prompts
from .encoding import Encoders
from .families.registry import family_of, make_family
from .parallel import PRECISIONS, make_processes
from .progress import Progress
from .run import Training
from .self_rollout.family import SelfRolloutFamily
from .self_rollout.nodes import Objective
from .self_rollout.run import SelfRolloutTraining
from .self_rollout.settings import DEFAULTS

DataSet = io.Custom("STILLMOTION_DATASET")
PICTURE_EVERY = 1.0   # seconds between live previews
NOT_IN_NAMES = {*map(chr, range(32)), *'\\/:*?"<>|'}  # not allowed in file names on some system


class TrainVideoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_TrainVideoModel",
            display_name="Train Video Model",
            category="Stillmotion/training",
            description="Trains a new video U-Net, or trains a video U-Net, DynamiCrafter or causal Wan further. Shows "
                        "loss and samples while it runs; cancelled, it saves first.",
            search_aliases=["train", "training", "finetune", "fine-tune", "video trainer"],
            advanced=["train", "caption_dropout", "motion_weight", "seed", "sample_every", "mixed_precision",
                      "gradient_checkpointing", "block", "lora_rank"],
            inputs=[
                DataSet.Input("data_set", tooltip="From Moving Shapes, Video Folder or Latent Shards: it decides "
                                                  "frames and size."),
                io.Clip.Input("clip", tooltip="Text encoder for the captions. New models: the CLIP of Load "
                                              "DynamiCrafter's demo, or CLIP-L. Others: the one of their own."),
                io.String.Input("name", default="video_model",
                                tooltip="The result is models/checkpoints/NAME_00001.safetensors (causal Wan: "
                                        "models/diffusion_models), numbered on; samples, curves, further checkpoints "
                                        "and the state lie in output/training/NAME_00001."),
                io.Boolean.Input("resume", default=False,
                                 tooltip="Go on with the last run of this name, exactly where it was stopped. The "
                                         "number of steps and the learning rate may be others, all else must be the "
                                         "same."),
                io.Int.Input("steps", default=1000, min=1, max=10_000_000, tooltip="Batches to learn from."),
                io.Int.Input("batch_size", default=4, min=1, max=1024, tooltip="Clips of a batch: more is steadier, "
                                                                               "and needs more memory."),
                io.Float.Input("learning_rate", default=1e-4, min=1e-7, max=1.0, step=1e-6, round=False,
                               tooltip="Peak, reached after a short warm-up; falls as a cosine. Small new models: "
                                       "0.001. Fine-tuning: 0.00001 to 0.0001."),
                io.Int.Input("model_channels", default=64, min=16, max=1024, step=16,
                             tooltip="Width of a new video U-Net. Not used with a model."),
                io.Combo.Input("train", options=list(PARTS), default="all",
                               tooltip="projector_temporal: only the image projector and the temporal layers of "
                                       "DynamiCrafter, which keeps its look and needs less memory."),
                io.Float.Input("caption_dropout", default=0.1, min=0.0, max=1.0, step=0.01,
                               tooltip="Fraction of captions dropped, which classifier-free guidance (cfg) needs."),
                io.Float.Input("motion_weight", default=1.0, min=0.1, max=100.0, step=0.1,
                               tooltip="How much more places count where something moves. 5 for small shapes on plain "
                                       "ground, 1 for real videos."),
                io.Int.Input("seed", default=0, min=0, max=0xffffffff, control_after_generate=False,
                             tooltip="Of new weights, the order of clips and the noise."),
                io.Int.Input("sample_every", default=200, min=1, max=1_000_000,
                             tooltip="Steps between samples; validation, curves and saved state come with them."),
                io.Combo.Input("mixed_precision", options=list(PRECISIONS), default="no",
                               tooltip="bf16 and fp16 halve memory and time on a GPU; they need the package "
                                       "accelerate."),
                io.Boolean.Input("gradient_checkpointing", default=False,
                                 tooltip="Much less memory, a third more time."),
                io.Vae.Input("vae", optional=True, tooltip="Encodes the clips. Not connected, a new model works on "
                                                           "pixels."),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="Image encoder, for DynamiCrafter and causal "
                                                                          "Wan image to video."),
                io.Model.Input("model", optional=True, tooltip="A model to train further, LoRAs included; it stays as "
                                                               "it is. Not connected: a new video U-Net."),
                io.Int.Input("block", default=0, min=0, max=64, optional=True,
                             tooltip="Causal Wan: latent frames made at once, as the sampler will. 0: 3, as in "
                                     "published models, or 4 for the demo."),
                io.Int.Input("lora_rank", default=16, min=1, max=1024, optional=True,
                             tooltip="With train lora: more can learn more, and makes a larger file."),
                Objective.Input("objective", optional=True, tooltip="From Self-Rollout: causal Wan learns from its own "
                                                                    "videos. Not connected: from the clips."),
            ],
            outputs=[
                io.Model.Output(tooltip="The trained model: the moving average of its weights."),
                io.Image.Output(display_name="curves", tooltip="Loss, validation loss and PSNR over the steps."),
                io.String.Output(display_name="checkpoint", tooltip="Name of the result, as its loader lists it."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, data_set, clip, name, resume, steps, batch_size, learning_rate, model_channels, train,
                caption_dropout, motion_weight, seed, sample_every, mixed_precision, gradient_checkpointing, vae=None,
                clip_vision=None, model=None, block=0, lora_rank=16, objective=None) -> io.NodeOutput:
        comfy.model_management.unload_all_models()
        device = comfy.model_management.get_torch_device()
        pixels = vae is None or vae.spacial_compression_encode() == 1
        with torch.inference_mode(False), torch.enable_grad():
            kind = family_of(model)
            settings = TrainConfig(
                train=train, from_scratch=False, batch_size=batch_size, steps=steps, learning_rate=learning_rate,
                model_channels=model_channels, **_depth(model_channels), caption_dropout=caption_dropout,
                emphasis=motion_weight, seed=seed, mixed_precision=mixed_precision, resume=resume,
                gradient_checkpointing=gradient_checkpointing, save_every=sample_every, sample_every=sample_every,
                block=block, lora_rank=lora_rank,
                space="pixels" if pixels else "latent", family=kind, checkpoint="" if model is None else "connected",
                **_frame_size(data_set))
            settings = replace(settings, **_rollout(objective))
            settings.check()
            family, training = _family(model, Encoders(None if pixels else vae, clip, clip_vision), settings, data_set,
                                       objective)
            result, folder = _places(name, resume, "loras" if train == "lora" else family.folder)
            show = _Show(steps)
            run = training(family, data_set, settings, result, folder, make_processes(mixed_precision, device), show)
            run.run()
        headline = f"{result.stem}: {steps} steps"
        trained = add_lora(model, read_checkpoint(result)) if train == "lora" else family.load(result)
        return io.NodeOutput(trained, as_images(draw_curves(read_curves(folder), headline)), result.name,
                             ui=ui.PreviewImage(as_images(run.picture(headline)), cls=cls))


class _Show:
    """Progress on the node: the bar, and every second the curve with the last samples. Interrupts are raised here."""

    def __init__(self, steps):
        self.bar, self.shown = comfy.utils.ProgressBar(steps), 0.0

    def __call__(self, progress: Progress) -> None:
        picture = None
        if time.monotonic() - self.shown > PICTURE_EVERY:
            self.shown = time.monotonic()
            picture = ("JPEG", progress.picture(), None)
        self.bar.update_absolute(progress.step, progress.steps, picture)
        comfy.model_management.throw_exception_if_processing_interrupted()


def _frame_size(data_set) -> dict:
    """The size of the clips, formatted as the setting; packed latents already have a size."""
    if not isinstance(data_set, Clips):
        return {}
    height, width = data_set[0]["video"].shape[2:]
    return {"frame_size": str(width) if width == height else f"{width}x{height}"}


def _rollout(objective) -> dict:
    """The settings of a training on its own videos; its own moving average and clipping."""
    if objective is None:
        return {}
    return {"objective": "self_rollout", "teacher": "connected", "validation_clips": 0, "warmup": 0,
            **{name: DEFAULTS[name] for name in ("ema_decay", "clip_norm")}, **objective.settings}


def _family(model, encoders, settings, data_set, objective) -> tuple:
    """(family, class of the run)"""
    if objective is not None:
        scores = objective.teacher, objective.fake_score
        return SelfRolloutFamily(model, *scores, encoders, settings), SelfRolloutTraining
    if isinstance(data_set, Prompts):
        raise ValueError("This data set has prompts alone, and the training learns from clips. Connect Self-Rollout as "
                         "objective, or a data set of clips.")
    return make_family(model, encoders, settings, data_set), Training


def _depth(model_channels) -> dict:
    """Fewer levels for small networks."""
    small = model_channels <= 64
    return {"channel_mult": [1, 2] if small else [1, 2, 4], "num_res_blocks": 1 if small else 2}


def _places(name, resume, kind) -> tuple[Path, Path]:
    """(result, run folder): the next free number for this name, or the last one with `resume`."""
    if not name.strip() or name.startswith(".") or len(name.encode()) > 200 or set(name) & NOT_IN_NAMES:
        raise ValueError(f"name is {shown(name)}: give a plain file name of at most 200 bytes, without folders, ending "
                         "and the characters \\ / : * ? \" < > |.")
    models = Path(folder_paths.get_folder_paths(kind)[0])
    runs = Path(folder_paths.get_output_directory()) / "training"
    used = [int(path.stem[len(name) + 1:]) for folder in (models, runs) if folder.is_dir()
            for path in folder.iterdir() if path.name.startswith(f"{name}_") and path.stem[len(name) + 1:].isdecimal()]
    number = max(used, default=0) if resume else max(used, default=0) + 1
    return models / f"{name}_{number:05}.safetensors", runs / f"{name}_{number:05}"
