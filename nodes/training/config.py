"""Training settings: defaults, overridden by a YAML file, overridden by the command line."""
from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path

from .families import DEFAULTS as FAMILY_DEFAULTS
from .families import FAMILIES
from .loop import OPTIMIZERS
from .objectives import LAWS
from .parallel import PRECISIONS
from .self_rollout.settings import DEFAULTS as ROLLOUT_DEFAULTS
from .self_rollout.settings import SelfRolloutSettings
from .setting import setting as _setting

SPACES = ("latent", "pixels")
OBJECTIVES = ("denoising", "self_rollout")
PARTS = ("all", "projector_temporal", "lora")
SIZE = re.compile(r"(\d+)(?:x(\d+))?")


@dataclass(kw_only=True)
class TrainConfig(SelfRolloutSettings):
    """All settings with their defaults. The texts are the command line's help."""

    family: str = _setting("video_unet", "network to train", tuple(FAMILIES))
    objective: str = _setting("denoising", "denoising: of clips; self_rollout: causal Wan on its own videos, by "
                              "distribution matching with a teacher", OBJECTIVES)
    checkpoint: str = _setting("", "file to fine-tune, or a demo by its name in the loader; empty: a new video U-Net")
    from_scratch: bool = _setting(False, "take only sizes from the checkpoint, and train new weights")
    network: str = _setting("", "class of a new video U-Net, as module:Class; empty: the pack's")
    init_2d: str = _setting("", "weights of a 2-D diffusion U-Net that the spatial layers begin with")
    train: str = _setting("all", "all weights, a LoRA beside them, or DynamiCrafter's projector_temporal", PARTS)
    lora_rank: int = _setting(16, "rank of the LoRA")
    lora_targets: list[str] = _setting(list, "parts of names of its layers, as self_attn. ffn.; none: all attentions")

    encoders: str = _setting("demo", "`demo` (that of the model), `demo, 96x96` or a DynamiCrafter checkpoint")
    vae: str = _setting("", "another VAE file, as core's Load VAE takes it")
    clip: str = _setting("", "another text encoder file, as core's Load CLIP takes it")
    clip_type: str = _setting("stable_diffusion", "type of that text encoder (core's Load CLIP), as wan")
    clip_vision: str = _setting("", "another vision tower file, as core's Load CLIP Vision takes it")
    vae_psnr: float = _setting(20.0, "least PSNR in dB of clips that the VAE has encoded and decoded; 0: not measured")
    space: str = _setting("latent", "where a new video U-Net works", SPACES)

    data_dir: str = _setting("", "folder with videos/ and captions/, or of shards; self_rollout also takes a text file "
                         "of prompts; empty: Moving Shapes are drawn")
    dataset: str = _setting("", "class of the data set in data_dir, as module:Class; empty: the pack's")
    max_samples: int = _setting(0, "clips to use at most, 0: all (of Moving Shapes: 1000)")
    num_frames: int = _setting(16, "frames of a clip")
    frame_size: str = _setting("64", "edge of the clips in pixels, or WIDTHxHEIGHT")
    stages: list[str] = _setting(list, "from low to high resolution, each SIZE:STEPS, as 32:2000 64:4000")
    mirror: bool = _setting(False, "mirror half of the clips, with left and right exchanged in their captions")
    num_workers: int = _setting(0, "processes that read clips")
    validation_clips: int = _setting(16, "last clips to keep for validation, at most a tenth")

    model_channels: int = _setting(128, "width of a new video U-Net")
    channel_mult: list[int] = _setting(lambda: [1, 2, 4], "width of its levels in model_channels")
    num_res_blocks: int = _setting(2, "residual blocks a level")
    schedule: str = _setting("cosine", "its noise schedule", ("cosine", "linear"))
    prediction: str = _setting("v", "what it predicts", ("v", "eps"))
    block: int = _setting(0, "causal Wan: latent frames made at once; 0: 3, as in published models, or 4 for the demo")

    batch_size: int = _setting(4, "clips of a batch")
    accumulation: int = _setting(1, "batches of a step, in each process")
    num_epochs: int = _setting(10, "times that every clip is seen, unless steps are given")
    steps: int = _setting(0, "steps to train; 0: as many as num_epochs make")
    learning_rate: float = _setting(1e-4, "peak, after warm-up; falls as a cosine to 1 % (self_rollout: stays)")
    warmup: int = _setting(100, "steps of warm-up, at most a tenth")
    ema_decay: float = _setting(0.999, "of the moving average of the weights, which is the result; less while a run "
                                "is short")
    clip_norm: float = _setting(1.0, "largest norm of a step's gradients")
    caption_dropout: float = _setting(0.1, "fraction of captions (and image tokens) dropped, for guidance")
    timesteps: str = _setting("uniform", "law of the noise levels; logit_normal favours the middle", LAWS)
    shift: float = _setting(5.0, "causal Wan: moves its noise levels towards pure noise, as its sampler does; 1: not")
    emphasis: float = _setting(1.0, "weight in the loss of places where something moves")
    seed: int = _setting(0, "of new weights, order of clips and noise")
    optimizer: str = _setting("adamw", "adamw8bit takes a quarter of the memory, and bitsandbytes", OPTIMIZERS)
    mixed_precision: str = _setting("no", "by accelerate", PRECISIONS)
    gradient_checkpointing: bool = _setting(False, "less memory for a longer step")
    device: str = _setting("auto", "cpu, cuda or auto")

    output: str = _setting("results/training/model.safetensors", "the result; a folder beside it keeps state and logs")
    resume: bool = _setting(False, "go on with the run that was stopped")
    save_every: int = _setting(200, "steps between saved states, with validation and curves")
    sample_every: int = _setting(1000, "steps between samples")
    checkpoint_every: int = _setting(5000, "steps between checkpoints that are kept")
    wandb: bool = _setting(False, "log to Weights & Biases, offline where there is no key")
    tensorboard: bool = _setting(False, "log to TensorBoard")

    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return parse_size(self.frame_size)

    def stage_list(self, steps: int) -> list[tuple[tuple[int, int], int]]:
        """[((height, width), steps)]; the whole training as one stage if no stages are given."""
        if not self.stages:
            return [(self.size(), steps)]
        return [(parse_size(size), int(count)) for size, count in (stage.split(":") for stage in self.stages)]

    def check(self) -> None:
        """Raise ValueError for an invalid setting; names the setting, its value and what is allowed."""
        for each in fields(self):
            value, choices = getattr(self, each.name), each.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{each.name} is {value!r}: choose one of {', '.join(choices)}.")
        for name in ("num_frames", "model_channels", "num_res_blocks", "lora_rank", "batch_size", "accumulation",
                     "num_epochs", "learning_rate", "clip_norm", "emphasis", "shift", "save_every", "sample_every",
                     "checkpoint_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0.")
        for name in ("max_samples", "num_workers", "validation_clips", "block", "steps", "warmup", "seed",
                     "vae_psnr"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be 0 or more.")
        for name, most in (("ema_decay", 0.999999), ("caption_dropout", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be from 0 to {most}.")
        if not self.output.endswith(".safetensors"):
            raise ValueError(f"output is {self.output!r}: it must end in .safetensors.")
        self.check_self_rollout()
        self._check_family()
        self.size()
        wrong = [stage for stage in self.stages if not re.fullmatch(r"\d+(x\d+)?:[1-9]\d*", stage)]
        if wrong:
            raise ValueError(f"stages has {wrong[0]!r}: give SIZE:STEPS, as 32:2000, or 512x320:2000.")
        if self.stages and parse_size(self.stages[-1].partition(":")[0]) != self.size():
            raise ValueError(f"The last of the stages {' '.join(self.stages)} is not of frame_size {self.frame_size}: "
                             "give the full size to both.")

    def _check_family(self) -> None:
        if self.objective == "self_rollout":
            self._check_rollout()
        if self.family in ("dynamicrafter", "causal_wan") and not self.checkpoint:
            raise ValueError(f"family {self.family} needs a checkpoint: a file to fine-tune, or to take the sizes from "
                             "(from_scratch), or demo.")
        if self.family == "vae" and (self.checkpoint or self.init_2d or self.stages):
            raise ValueError("family vae trains a new VAE at one size: leave checkpoint, init_2d and stages away.")
        if self.network and self.family != "video_unet":
            raise ValueError(f"network {self.network} is for family video_unet: leave it away for {self.family}.")
        if self.dataset and not self.data_dir:
            raise ValueError(f"dataset {self.dataset} needs a folder: name it with data_dir.")
        if self.train == "projector_temporal" and self.family != "dynamicrafter":
            raise ValueError(f"train {self.train} is for family dynamicrafter: choose all or lora.")
        if self.train == "lora" and (self.from_scratch or not self.checkpoint):
            raise ValueError("train lora adapts the weights of a checkpoint: name one, and leave from_scratch away.")
        if self.from_scratch and not self.checkpoint:
            raise ValueError("from_scratch takes the sizes from a checkpoint, and none was given: name one, or leave "
                             "from_scratch away (a new video U-Net is always trained from scratch).")

    def _check_rollout(self) -> None:
        """Raise ValueError for a training on its own rollouts that this family, or these settings, do not allow."""
        if self.family != "causal_wan":
            raise ValueError(f"objective self_rollout is for family causal_wan; {self.family} is trained on clips: "
                             "choose denoising.")
        if not self.teacher:
            raise ValueError("objective self_rollout needs a teacher: a file of a bidirectional Wan that makes good "
                             "videos in many steps.")
        if self.stages:
            raise ValueError(f"stages is {' '.join(self.stages)}, and objective self_rollout makes all videos of a "
                             "training at one size, from the student, teacher and fake score of that size. Train at "
                             "the small frame_size first, then begin anew at the large one with the result as "
                             "checkpoint.")
        for name in ("from_scratch", "init_2d"):
            if getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)!r}, and objective self_rollout needs a student that "
                                 "makes passable videos from the first step on: give it as checkpoint, and leave "
                                 f"{name} away.")


ROLLOUT_SETTINGS = {each.name for each in fields(SelfRolloutSettings)}


def all_settings() -> list[Field]:
    """Fields of `TrainConfig`, those of self-rollout last."""
    return sorted(fields(TrainConfig), key=lambda each: each.name in ROLLOUT_SETTINGS)


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) from "64" or "512x320" (width first)."""
    found = SIZE.fullmatch(str(text))
    if not found or not int(found[1]) or found[2] and not int(found[2]):
        raise ValueError(f"frame_size is {text!r}: give the edge in pixels, as 64, or WIDTHxHEIGHT, as 512x320.")
    return int(found[2] or found[1]), int(found[1])


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting. Flags not given are absent from the result, so that the YAML value applies."""
    group = parser.add_argument_group("objective self_rollout")
    for each in all_settings():
        place = group if each.name in ROLLOUT_SETTINGS else parser
        text = each.metadata["help"].replace("%", "%%")  # argparse expands % itself
        flag = {"dest": each.name, "default": argparse.SUPPRESS}
        if each.type == "bool":
            text = f"{text} (default: {'yes' if each.default else 'no'})"
            place.add_argument(f"--{each.name}", action="store_true", help=text, **flag)
            place.add_argument(f"--no_{each.name}", action="store_false", **flag,
                               help=f"not {each.name}" if each.default else argparse.SUPPRESS)
        elif each.type.startswith("list"):
            kind = int if each.type == "list[int]" else str
            place.add_argument(f"--{each.name}", nargs="+", type=kind, help=text, **flag)
        else:
            kind = {"int": int, "float": float, "str": str}[each.type]
            place.add_argument(f"--{each.name}", type=kind, choices=each.metadata["choices"] or None,
                                help=f"{text} (default: {each.default!r})", **flag)


def make_config(yaml_path: str | Path | None, given: dict, saved: Callable[[Path], dict] = lambda folder: {}
                ) -> TrainConfig:
    """Defaults (some are the family's or the objective's own), then the YAML, then `given`; checked. To resume, the
    run's own settings (`saved(its folder)`) stand in for the defaults. Raises ValueError that names the file, setting
    and value."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        loaded = OmegaConf.create() if yaml_path is None else OmegaConf.load(yaml_path)
    except (OSError, YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{yaml_path} cannot be read as YAML: {error}") from error
    if not OmegaConf.is_dict(loaded):
        raise ValueError(f"{yaml_path} holds no settings: write one `name: value` a line.")
    sources = [(yaml_path, loaded), ("the command line", given)]
    config = _merged(sources)
    if config.resume:
        folder = Path(config.output).with_suffix("")
        known = {each.name for each in fields(TrainConfig)} - {"output"}
        before = {name: value for name, value in saved(folder).items() if name in known}
        config = _merged([(folder, before), *sources])
    config.check()
    return config


def _merged(sources: Sequence[tuple[str | Path | None, dict]]) -> TrainConfig:
    """The defaults, overridden by each of the sources (name, settings) in turn."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config, chosen = OmegaConf.structured(TrainConfig), {}
    for _, given in sources:
        chosen.update({name: given[name] for name in ("family", "objective") if name in given})
    own = [FAMILY_DEFAULTS.get(chosen.get("family"), {}),
           ROLLOUT_DEFAULTS if chosen.get("objective") == "self_rollout" else {}]
    for source, settings in (*(("the defaults", each) for each in own), *sources):
        try:
            config = OmegaConf.merge(config, settings)
        except OmegaConfBaseException as error:
            raise ValueError(f"{source}: {error.full_key} does not fit: {str(error).splitlines()[0]}. Settings: "
                             f"{', '.join(each.name for each in all_settings())}.") from error
    return OmegaConf.to_object(config)
