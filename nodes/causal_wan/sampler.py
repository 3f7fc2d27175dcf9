"""The block loop as one of ComfyUI's samplers: its memory management, patches, wrappers, interrupt and previews act.

Layouts: B videos, C channels, T latent frames of the video, F those of one evaluation, H, W latent height and width.
"""
from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import comfy.model_management
import comfy.samplers
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from .blocks import BlockLoop, Plan, split_frames
from .cache import KVCache
from .conditioning import CHUNK, CLAMP, CONCAT, PREFIX, START_KEY, StartFrames
from .model import PATCH
from .noise import seeded_noise
from .schedule import make_steps
from .timeline import PromptTimeline, apply_timeline

log = logging.getLogger(__name__)
UNSUPPORTED = ("control", "gligen", "area", "mask", "hooks", "start_percent", "end_percent")


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """Settings of one run as a user states them; see `Plan` for those that it takes as they are."""

    steps: str               # denoising_step_list, "1000, 750, 500, 250"
    first_steps: str         # of the first block, "": the same
    shift: float
    warp: bool               # see `make_steps`
    block: int               # latent frames
    independent_first: bool  # the first latent frame is a block of its own
    short_last: bool
    window: int
    sink: int
    endless: bool
    context_noise: float
    cfg: float
    global_sink: bool


def parse_steps(text: str) -> list[int]:
    """Numbers of a denoising step list, separated by commas or spaces."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise ValueError(f"The denoising steps are {text!r}: give whole numbers separated by commas, as the model was "
                         "trained with, for example 1000, 750, 500, 250.")
    return [int(word) for word in words]


def lay_out(frames: int, start: StartFrames | None, settings: BlockSettings) -> tuple[int, ...]:
    """Blocks of the video. Frames that are given to the cache decide whether the first one stands alone."""
    if start is not None and start.block != settings.block:
        raise ValueError(f"The latent was made for blocks of {start.block}, the sampler is set to {settings.block}: "
                         "give Causal Wan Image to Video and the sampler the same block.")
    first = settings.independent_first
    if start is not None and start.mechanism in (PREFIX, CHUNK):
        first = start.mechanism == PREFIX
    return split_frames(frames, settings.block, first, settings.short_last)


def make_plan(settings: BlockSettings, frames: int, start: StartFrames | None, switches: tuple[int, ...]) -> Plan:
    """Plan of a run over `frames` latent frames, given ones included; `switches` are counted likewise."""
    if not 0 <= settings.cfg < float("inf"):
        raise ValueError(f"cfg is {settings.cfg}: give 0 or more. Models with few steps were trained for 1.")
    steps = make_steps(parse_steps(settings.steps), settings.shift, settings.warp)
    first_steps = steps
    if settings.first_steps.strip():
        first_steps = make_steps(parse_steps(settings.first_steps), settings.shift, settings.warp)
    return Plan(blocks=lay_out(frames, start, settings), steps=steps, first_steps=first_steps,
                context_noise=settings.context_noise, window=settings.window, sink=settings.sink,
                endless=settings.endless, switches=switches, global_sink=settings.global_sink, cfg=settings.cfg,
                freeze_sink=False)


def inference_dtype(model) -> torch.dtype:
    """The type that a BaseModel computes in, which its keys have too."""
    return model.manual_cast_dtype or model.get_dtype()


class Network:
    """Evaluates the network of a BaseModel the way that core's samplers do: through what packs put around it."""

    def __init__(self, model, model_options: dict, device):
        self.model, self.options, self.device, self.dtype = model, model_options, device, inference_dtype(model)

    def flow(self, x_BCFHW: Tensor, t_BF: Tensor, keys, frame_ids: range, cache: KVCache, sink_mode: str,
             branch: int) -> Tensor:
        """Flow in float32; branch 0 is the positive one."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        options = {**self.options["transformer_options"], "cond_or_uncond": [branch],
                   "sigmas": t_BF.amax(1) / 1000}
        block = {"c_crossattn": keys, "transformer_options": options, "frame_ids": frame_ids, "cache": cache,
                 "sink_mode": sink_mode}
        wrapper = self.options.get("model_function_wrapper")
        if wrapper is None:
            return self._wrapped(x_BCFHW, t_BF, **block)
        return wrapper(self._wrapped, {"input": x_BCFHW, "timestep": t_BF, "c": block, "cond_or_uncond": [branch]})

    def _wrapped(self, x_BCFHW, t_BF, c_crossattn, transformer_options, **block):
        wrappers = get_all_wrappers(WrappersMP.APPLY_MODEL, transformer_options)
        executor = WrapperExecutor.new_class_executor(self._apply, self.model, wrappers)
        return executor.execute(x_BCFHW, t_BF, None, c_crossattn, None, transformer_options, **block)

    def _apply(self, x_BCFHW, t_BF, c_concat, c_crossattn, control, transformer_options, **block):
        return self.model.diffusion_model(x_BCFHW.to(self.dtype), t_BF, c_crossattn,
                                          transformer_options=transformer_options, **block).float()

    def project(self, model_conds: dict, batch: int):
        """Cross-attention keys of one prompt, for `batch` videos."""
        def tokens(name):
            if name not in model_conds:
                return None
            cond = model_conds[name].process_cond(batch_size=batch).cond
            return comfy.model_management.cast_to_device(cond, self.device, self.dtype)

        return self.model.diffusion_model.project_context(tokens("c_crossattn"), tokens("clip_fea"))


class BlockSampler(comfy.samplers.Sampler):
    """Core sampler object over a guider's conditionings "positive", "prompt 1", ..., "negative".

    The first `start.frames` latent frames are given. SIGMAS are not read: the steps belong to `plan`.
    """

    def __init__(self, plan: Plan, start: StartFrames | None, draw: Callable[[int, int, int], Tensor]):
        self.plan, self.start, self.draw = plan, start, draw

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        """Called by core's guiders; noise and latent_image [B, C, T, H, W]. Returns the whole video's latent."""
        plan, model, device = self.plan, guider.inner_model, noise.device
        batch, _, _, height, width = noise.shape
        network = Network(model, extra_args["model_options"], device)
        caches = [KVCache(plan.layout(model.wan_params, height, width), batch, network.dtype, device)
                  for _ in range(plan.branches)]

        def project(prompt: int):
            names = ["positive" if prompt == 0 else f"prompt {prompt}", "negative"][:plan.branches]
            return [network.project(guider.conds[name][0]["model_conds"], batch) for name in names]

        def evaluate(x, t, keys, frame_ids, cache, sink_mode):
            branch = 0 if cache is caches[0] else 1
            return network.flow(x, t, keys, frame_ids, cache, sink_mode, branch)

        context = held = None
        if self.start is not None and self.start.frames:
            given = latent_image[:, :, :self.start.frames]
            context, held = (None, given) if self.start.mechanism == CLAMP else (given, None)
        y = guider.conds["positive"][0]["model_conds"].get("c_concat")
        loop = BlockLoop(plan=plan, evaluate=evaluate, caches=caches, project=project,
                         noise=lambda *place: self.draw(*place).to(device),
                         y_BYFHW=None if y is None else y.process_cond(batch_size=batch, area=None).cond.to(device),
                         on_step=self._progress(callback))
        blocks = [block.latent_BCFHW for block in loop.run(context, held, None)]
        kept = [] if context is None else [context[:, :, :1] if self.start.still else context]
        return torch.cat([*kept, *blocks], dim=2)

    def _progress(self, callback):
        """Counts the steps of all blocks; the preview shows the block that is being made."""
        plan, first = self.plan, given_blocks(self.plan, self.start)
        total = count_steps(plan, first)

        def on_step(block: int, step: int, x0_BCFHW: Tensor) -> None:
            done = step if block == first else len(plan.first_steps) + (block - first - 1) * len(plan.steps) + step
            if callback:
                callback(done, x0_BCFHW, x0_BCFHW, total)

        return on_step


def given_blocks(plan: Plan, start: StartFrames | None) -> int:
    """Blocks at the start that go into the cache as they are."""
    return 0 if start is None or start.mechanism == CLAMP else plan.leading_blocks(start.frames)


def count_steps(plan: Plan, given: int) -> int:
    return len(plan.first_steps) + (len(plan.blocks) - given - 1) * len(plan.steps)


def check_latent(model, latent: dict) -> None:
    """Raise ValueError unless MODEL is a causal Wan and LATENT one that it can sample."""
    params = getattr(model.model, "wan_params", None)
    if params is None:
        raise ValueError(f"The model is {type(model.model).__name__}, not a causal Wan: use Load Causal Wan. For other "
                         "models use KSampler.")
    samples = latent["samples"]
    shape = " x ".join(map(str, samples.shape))
    if samples.ndim != 5 or samples.shape[1] != params.out_dim or 0 in samples.shape:
        raise ValueError(f"The latent is {shape}, this model takes [batch, {params.out_dim}, frames, height, width]: "
                         "use the latent of Causal Wan Image to Video, or an empty Wan video latent.")
    if samples.shape[3] % PATCH[1] or samples.shape[4] % PATCH[2]:
        raise ValueError(f"The latent is {shape}: height and width must be multiples of {PATCH[1]} (16 pixels with "
                         "Wan's VAE). Choose another video size.")
    if not samples.isfinite().all():
        raise ValueError(f"The latent holds {(~samples.isfinite()).sum().item()} NaN or infinite values. Look at the "
                         "node that made it (a VAE in half precision?).")
    if "noise_mask" in latent:
        raise ValueError("The latent has a noise mask, which block by block sampling cannot keep to. Take it off; "
                         "to go on from given frames use Causal Wan Image to Video.")
    start = latent.get(START_KEY)
    if start is not None and start.mechanism == CONCAT and not params.i2v:
        raise ValueError("The latent was made with mechanism concat, but this is a text-to-video model, which does not "
                         f"see the image that way: choose {PREFIX} (models of block 1), {CHUNK} or auto without image "
                         "tokens in Causal Wan Image to Video.")


def check_conditionings(model, conds: dict, samples_BCTHW: Tensor) -> None:
    """Raise ValueError unless every conditioning fits the model and the latent."""
    for name, conditioning in conds.items():
        if len(conditioning) != 1:
            raise ValueError(f"The {name} conditioning has {len(conditioning)} entries, this sampler takes 1: "
                             "Conditioning Combine is not supported; use Prompt Timeline for changes over time.")
        text, values = conditioning[0]
        found = [key for key in UNSUPPORTED if values.get(key) is not None]
        if found:
            raise ValueError(f"The {name} conditioning has {', '.join(found)}, which this sampler does not know: take "
                             "it from CLIP Text Encode or Causal Wan Image to Video alone.")
        noise = samples_BCTHW.new_zeros(1).expand(samples_BCTHW.shape)
        entries = model.model.extra_conds(**{**values, "noise": noise, "device": noise.device, "cross_attn": text})
        for key, entry in entries.items():
            if len(entry.cond) not in (1, len(samples_BCTHW)):
                raise ValueError(f"The {name} conditioning holds {key} for {len(entry.cond)} videos, the latent a "
                                 f"batch of {len(samples_BCTHW)}: give one, or as many as the batch.")


class Run(NamedTuple):
    """A checked run, ready to sample."""

    guider: comfy.samplers.CFGGuider
    sampler: BlockSampler
    latent: dict
    seed: int
    steps: int
    summary: str

    def sample(self, callback: Callable | None = None) -> dict:
        """LATENT of the whole video. callback(step, x0 of the block, x0, steps) is called after every step."""
        samples = self.latent["samples"]
        sigmas = torch.tensor([step.sigma for step in self.sampler.plan.steps] + [0.0])
        log.info(self.summary)
        result = self.guider.sample(torch.zeros_like(samples), samples, self.sampler, sigmas, callback=callback,
                                    seed=self.seed)
        rest = {key: value for key, value in self.latent.items() if key != START_KEY}
        return {**rest, "samples": result.to(comfy.model_management.intermediate_device())}


def prepare(model, positive, negative, latent: dict, timeline: PromptTimeline | None, seed: int,
            settings: BlockSettings) -> Run:
    """Check everything that a run needs. ValueErrors say what was given, what is allowed and what to do."""
    check_latent(model, latent)
    samples, start = latent["samples"], latent.get(START_KEY)
    batch, channels, frames, height, width = samples.shape
    cut = start.frames - 1 if start is not None and start.still else 0
    prompts, switches = apply_timeline(timeline, positive, frames - cut)
    plan = make_plan(settings, frames, start, tuple(frame + cut for frame in switches))
    given = given_blocks(plan, start)
    if given == len(plan.blocks):
        raise ValueError(f"All {frames} latent frames are given: nothing is left to make. Give a larger length.")
    conds = {"positive": prompts[0], **{f"prompt {index}": prompt for index, prompt in enumerate(prompts) if index}}
    if plan.branches == 2:
        conds["negative"] = negative
    check_conditionings(model, conds, samples)
    params = model.model.wan_params
    nbytes = plan.cache_bytes(params, height, width, batch, inference_dtype(model.model).itemsize)
    longest = max(max(plan.blocks), plan.capacity if plan.switches else 0)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({name: [[text, {**values, "block_memory": (nbytes, longest)}] for text, values in cond]
                            for name, cond in conds.items()})
    guider.set_cfg(settings.cfg)
    steps = count_steps(plan, given)
    summary = (f"{frames - cut} latent frames; {len(plan.blocks) - given} blocks to make in "
               f"{steps} steps; cache {nbytes / 2 ** 20:.1f} MiB for {plan.capacity} latent frames, "
               f"{plan.branches} guidance branch{'es' if plan.branches > 1 else ''}")
    return Run(guider, BlockSampler(plan, start, seeded_noise(seed, batch, channels, height, width)), latent, seed,
               steps, summary)
