"""Turns settings and ComfyUI's objects into a validated run of the block-autoregressive sampler.

Layouts: B videos, C channels, T latent frames of the video, F those of one block, H, W latent height and width.
"""
from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import NamedTuple

import comfy.model_management
import comfy.samplers
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP, get_all_wrappers
from torch import Tensor

from ..common.demo import other_encoders
from ..common.notes import say_on_node
from .base import wan_params
from .blocks import Plan, split_frames
from .conditioning import CHUNK, CONCAT, PREFIX, START_KEY, StartFrames, latent_frames
from .fingerprint import Fingerprint, digest, model_digests
from .live import check_vae, decode_bytes
from .model import PATCH
from .noise import seeded_noise
from .resume import BlockFolder
from .sampler import BlockSampler, count_steps, given_blocks, inference_dtype
from .schedule import make_steps
from .steering import Steering, encode_prompt
from .timeline import Prompts, PromptTimeline, apply_timeline, with_image

log = logging.getLogger(__name__)
FORMAT = 1  # of stored runs: increment when the same settings produce different values
UNTIL_STOPPED = -1  # as a length
UNSUPPORTED = ("control", "gligen", "area", "mask", "hooks", "start_percent", "end_percent")


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """User settings of one run; see `Plan` for those passed on unchanged."""

    steps: str               # denoising_step_list, "1000, 750, 500, 250"
    first_steps: str         # for the first block, "": the same
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
    """Parse a denoising step list, numbers separated by commas or spaces."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise ValueError(f"The denoising steps are {text!r}: give whole numbers separated by commas, as the model was "
                         "trained with, for example 1000, 750, 500, 250.")
    return [int(word) for word in words]


def lay_out(frames: int, start: StartFrames | None, settings: BlockSettings, endless: bool) -> tuple[int, ...]:
    """Block lengths of the video. Frames given to the cache decide whether the first frame is a block of its own.

    endless: only the first block; `settings.block` frames at a time follow.
    """
    if start is not None and start.block != settings.block:
        raise ValueError(f"The latent was made for blocks of {start.block}, the sampler is set to {settings.block}: "
                         "give Causal Wan Image to Video and the sampler the same block.")
    first = settings.independent_first
    if start is not None and start.mechanism in (PREFIX, CHUNK):
        first = start.mechanism == PREFIX
    if endless:
        frames = 1 if first else settings.block
    return split_frames(frames, settings.block, first, settings.short_last)


def make_plan(settings: BlockSettings, frames: int, start: StartFrames | None, switches: tuple[int, ...],
              endless: bool = False) -> Plan:
    """Plan of a run over `frames` latent frames, including given ones; `switches` use the same count. endless: the run
    goes on until it is stopped."""
    if not 0 <= settings.cfg < float("inf"):
        raise ValueError(f"cfg is {settings.cfg}: give 0 or more. Models with few steps were trained for 1.")
    steps = make_steps(parse_steps(settings.steps), settings.shift, settings.warp)
    first_steps = steps
    if settings.first_steps.strip():
        first_steps = make_steps(parse_steps(settings.first_steps), settings.shift, settings.warp)
    return Plan(blocks=lay_out(frames, start, settings, endless), further=settings.block if endless else 0,
                steps=steps, first_steps=first_steps, context_noise=settings.context_noise, window=settings.window,
                sink=settings.sink, endless=settings.endless, switches=switches, global_sink=settings.global_sink,
                cfg=settings.cfg)


def check_latent(model, latent: dict) -> None:
    """Raise ValueError unless MODEL is a causal Wan that can sample LATENT."""
    params, samples = wan_params(model), latent["samples"]
    shape = " x ".join(map(str, samples.shape))
    start = latent.get(START_KEY)
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
    if start is None and samples.any():
        raise ValueError("The latent holds a video already, and nothing tells how to go on from it. Decode it and give "
                         "the frames to Causal Wan Image to Video, or give an empty latent.")
    if start is not None and start.mechanism == CONCAT and not params.i2v:
        raise ValueError("The latent was made with mechanism concat, but this is a text-to-video model, which does not "
                         "see the image that way (auto chooses concat where image tokens are connected and no model "
                         f"is): connect the model to Causal Wan Image to Video, or choose {PREFIX} (models of block "
                         f"1) or {CHUNK} there.")


def check_patches(model) -> None:
    """Raise ValueError for patches on a MODEL that need a whole-video sampler or would have no effect here."""
    options = model.model_options
    transformer_options = options.get("transformer_options", {})
    present = {name: bool(get_all_wrappers(name, transformer_options) + model.get_all_wrappers(name))
               for name in (WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH)}
    found = [what for what, there in {
        "a cache of whole steps (EasyCache, LazyCache) or another wrapper around a step": any(present.values()),
        "a function for batches of conditionings": "sampler_calc_cond_batch_function" in options,
        "context windows": "context_handler" in options,
        "another scale of RoPE": "rope_options" in transformer_options}.items() if there]
    if found:
        raise ValueError(f"The model carries {', '.join(found)}, for samplers that make a video in one piece; block by "
                         "block it cannot act. Take that node off the way from Load Causal Wan to the sampler.")


def check_conditionings(model, conds: dict, samples_BCTHW: Tensor) -> None:
    """Raise ValueError unless every conditioning matches the model and the latent."""
    for name, conditioning in conds.items():
        if len(conditioning) != 1:
            raise ValueError(f"The {name} conditioning has {len(conditioning)} entries, this sampler takes 1: "
                             "Conditioning Combine is not supported; use Prompt Timeline for changes over time.")
        _, values = conditioning[0]
        found = [key for key in UNSUPPORTED if values.get(key) is not None]
        if found:
            raise ValueError(f"The {name} conditioning has {', '.join(found)}, which this sampler does not know: take "
                             "it from CLIP Text Encode or Causal Wan Image to Video alone.")
        for key, value in condition_tensors(model, conditioning, samples_BCTHW).items():
            if len(value) not in (1, len(samples_BCTHW)):
                raise ValueError(f"The {name} conditioning holds {key} for {len(value)} videos, the latent a "
                                 f"batch of {len(samples_BCTHW)}: give one, or as many as the batch.")


def condition_tensors(model, conditioning, samples_BCTHW: Tensor) -> dict[str, Tensor]:
    """The network inputs from a conditioning, by name."""
    text, values = conditioning[0]
    noise = samples_BCTHW.new_zeros(1).expand(samples_BCTHW.shape)
    entries = model.model.extra_conds(**{**values, "noise": noise, "device": noise.device, "cross_attn": text})
    return {key: entry.cond for key, entry in entries.items()}


class Run(NamedTuple):
    """A validated run, ready to sample."""

    guider: comfy.samplers.CFGGuider
    plan: Plan
    start: StartFrames | None
    latent: dict
    seed: int
    steps: int
    summary: str
    positive: list
    prompts: Prompts                                # planned ones
    encode: Callable[[str], list] | None            # CONDITIONING of a text; None without a text encoder
    fingerprint: Callable[[], Fingerprint]
    replanned: Callable[[Fingerprint, Prompts], Fingerprint]

    @property
    def given(self) -> int:
        """Number of blocks that are given."""
        return given_blocks(self.plan, self.start)

    @property
    def cut(self) -> int:
        """Number of leading latent frames that are not part of the video."""
        return cut_frames(self.start)

    def sample(self, callback: Callable | None = None, folder: BlockFolder | None = None,
               show: Callable[[Tensor], None] | None = None, steering: Steering | None = None) -> dict:
        """LATENT of the whole video. callback(step, x0 of the block, x0, steps) is called after every step.

        Finished blocks are stored in `folder` and reloaded from it. show(latent_CFHW) receives the first video of the
        batch, block by block. `steering` may change prompts and end the run.
        """
        result = self._sample(callback, folder, show, steering, whole=True)
        rest = {key: value for key, value in self.latent.items() if key != START_KEY}
        return {**rest, "samples": result.to(comfy.model_management.intermediate_device())}

    def stream(self, callback: Callable | None, folder: BlockFolder | None, show: Callable[[Tensor], None],
               steering: Steering | None = None) -> None:
        """Like `sample`, but keeps only as much of the video in memory as the cache needs."""
        self._sample(callback, folder, show, steering, whole=False)

    def _sample(self, callback, folder, show, steering, whole: bool) -> Tensor:
        model = self.guider.model_patcher.model
        samples = self.latent["samples"]
        if not model.wan_params.i2v:  # the conditioning of I2V models is checked against the full length
            samples = samples[:, :, :max(1, self.start.frames if self.start else 0)]

        def deliver(index: int | None, latent_BCFHW: Tensor) -> bool:
            if folder is not None and index is not None:
                folder.keep(index, latent_BCFHW)
            if show is not None:
                show(model.process_latent_out(latent_BCFHW[:1].float())[0])
            return steering is not None and steering.ends(latent_BCFHW.shape[2])

        def change(index: int, start: int):
            found = steering.change(index, start, folder is not None and folder.holds_from(index))
            if found is None:
                return None
            if folder is not None:
                folder.fingerprint = self.replanned(folder.fingerprint, steering.prompts)
            return with_image(self.positive, found)

        batch, channels, _, height, width = samples.shape
        sampler = BlockSampler(self.plan, self.start, seeded_noise(self.seed, batch, channels, height, width),
                               folder.recall if folder else lambda index: None, deliver, whole,
                               change if steering and self.encode else None)
        log.info(self.summary)
        sigmas = torch.tensor([step.sigma for step in self.plan.steps] + [0.0])
        return self.guider.sample(torch.zeros_like(samples), samples, sampler, sigmas, callback=callback,
                                  seed=self.seed)


def cut_frames(start: StartFrames | None) -> int:
    return start.frames - 1 if start is not None and start.still else 0


def prepare(model, positive, negative, latent: dict, timeline: PromptTimeline | None, seed: int,
            settings: BlockSettings, vae=None, length: int = 0, clip=None) -> Run:
    """Validate everything a run needs. ValueErrors say what was given, what is allowed and what to do.

    vae: decodes finished blocks for display. length: total video frames, 0 for the latent's length, `UNTIL_STOPPED`.
    clip: encodes prompts that are sent while the run samples.
    """
    check_latent(model, latent)
    check_patches(model)
    samples, start, params = latent["samples"], latent.get(START_KEY), wan_params(model)
    batch, _, frames, height, width = samples.shape
    if vae is not None:
        check_vae(vae, params.out_dim)
    cut, endless = cut_frames(start), length == UNTIL_STOPPED
    if length and not endless:
        frames = longer(length, frames, cut, vae, params)
    if start is not None and start.frames >= frames and not endless:
        raise ValueError(f"{start.frames - cut} of {frames - cut} latent frames are given: nothing is left to make. "
                         "Give a larger length.")
    texts, switches = apply_timeline(timeline, positive, inf if endless else frames - cut)
    plan = make_plan(settings, frames, start, tuple(frame + cut for frame in switches), endless)
    given = given_blocks(plan, start)
    check_switches(plan, given, cut)
    conds = named(positive, texts)
    if plan.branches == 2:
        conds["negative"] = negative
    check_conditionings(model, conds, samples)
    say_on_node(other_encoders(model, positive))
    itemsize = inference_dtype(model.model).itemsize
    nbytes = plan.cache_bytes(params, height, width, batch, itemsize)
    switching = bool(plan.switches) or clip is not None
    longest = max(*plan.blocks, plan.further, plan.capacity if switching else 0)
    patcher, decoding, helpers = model, 0, []
    if vae is not None:
        helpers, decoding = [vae.patcher], decode_bytes(vae, samples.shape)
    if clip is not None:
        helpers.append(clip.patcher)
    if helpers:
        patcher = model.clone()
        patcher.set_additional_models("stillmotion_helpers", helpers)
    guider = comfy.samplers.CFGGuider(patcher)
    kept = prompt_bytes(params, conds, plan.branches * (2 if switching else 1), batch, itemsize)
    memory = (nbytes + kept, longest, decoding)
    guider.inner_set_conds({name: [[text, {**values, "block_memory": memory}] for text, values in cond]
                            for name, cond in conds.items()})
    guider.set_cfg(settings.cfg)
    steps = count_steps(plan, given)
    todo = (f"until stopped; {len(plan.steps)} steps a block" if endless else
            f"{frames - cut} latent frames; {len(plan.blocks) - given} blocks to make in {steps} steps")
    summary = (f"{todo}; cache {nbytes / 2 ** 20:.1f} MiB for {plan.capacity} latent frames, "
               f"{plan.branches} guidance branch{'es' if plan.branches > 1 else ''}")

    def encode(text: str) -> list:
        conditioning = encode_prompt(clip, text)
        check_conditionings(model, {"new": with_image(positive, conditioning)}, samples)
        return conditioning

    def replanned(before: Fingerprint, prompts: Prompts) -> Fingerprint:
        changed = replace(plan, switches=tuple(prompts.switches))
        return before._replace(blocks=block_entries(model, named(positive, prompts.prompts), samples, changed))

    return Run(guider, plan, start, latent, seed, steps, summary, positive,
               Prompts(texts, [frame + cut for frame in switches]), encode if clip is not None else None,
               lambda: run_fingerprint(model, conds, latent, plan, settings, seed), replanned)


def named(positive, prompts: list) -> dict:
    """The prompts with the start image of `positive`, by their names in the guider."""
    return {f"prompt {index}" if index else "positive": with_image(positive, prompt)
            for index, prompt in enumerate(prompts)}


def prompt_bytes(params, conds: dict, alive: int, batch: int, itemsize: int) -> int:
    """Bytes of the cross-attention keys and values of the `alive` prompts in memory at once: two at a switch."""
    tokens = 0
    for (text, values), in conds.values():
        image = values["clip_vision_output"].penultimate_hidden_states.shape[1] if params.i2v else 0
        tokens = max(tokens, text.shape[1] + image)
    return alive * batch * params.num_layers * 2 * tokens * params.dim * itemsize


def longer(length: int, frames: int, cut: int, vae, params) -> int:
    """Latent frames for `length` video frames, including `cut` frames that precede them."""
    wanted = latent_frames(length, vae.temporal_compression_decode() or 1, "length") + cut
    if params.i2v and wanted != frames:
        raise ValueError(f"length is {length} video frames, {wanted - cut} latent ones, but the conditioning's image "
                         f"latent (y) was made for {frames - cut}: give Causal Wan Image to Video this length, and "
                         "here 0.")
    return wanted


def check_switches(plan: Plan, given: int, cut: int) -> None:
    """Raise ValueError unless some block starts with each prompt. Frame numbers in messages exclude `cut` frames."""
    last = min(plan.frames, max(plan.switches, default=0) + 2 * max(*plan.blocks, plan.further))
    edges = [edge for edge in plan.edges(last)[given:] if edge < plan.frames]
    begins = [next((edge for edge in edges if edge >= frame), None) for frame in plan.switches]
    for frame, begin, after in zip(plan.switches, begins, [*begins[1:], -1]):
        if begin is None or begin == after:
            starts = ", ".join(str(edge - cut) for edge in edges[:8]) + (", ..." if len(edges) > 8 else "")
            why = "no block begins at or after it" if begin is None else "the next prompt begins with the same block"
            end = "" if plan.further else f" (the last one at {plan.frames - plan.blocks[-1] - cut})"
            raise ValueError(f"The prompt from latent frame {frame - cut} is never used: {why}. A prompt begins with "
                             f"the next block; the blocks begin at {starts}{end}.")


def run_fingerprint(model, conds: dict, latent: dict, plan: Plan, settings: BlockSettings, seed: int) -> Fingerprint:
    """Fingerprint of everything that determines the latents of a run."""
    samples, start = latent["samples"], latent.get(START_KEY)
    negative = prompt_digest(condition_tensors(model, conds["negative"], samples)) if "negative" in conds else None
    steps, first = parse_steps(settings.steps), settings.first_steps.strip()
    chosen = {name: value for name, value in asdict(settings).items()
              if name not in ("block", "independent_first", "short_last")}  # each block has its length
    whole = {**chosen, "steps": steps, "first_steps": parse_steps(first) if first else steps, "seed": seed,
             "format": FORMAT, **model_digests(model), "attention": digest(optimized_attention),
             "weights": str(model.model.get_dtype()), "dtype": str(inference_dtype(model.model)),
             "device": comfy.model_management.get_torch_device_name(model.load_device),
             "latent size": list(samples.shape[:2] + samples.shape[3:]), "start": list(start or ()),
             "start latent": digest(samples[:, :, :start.frames if start else 0]), "negative": negative}
    return Fingerprint(whole, block_entries(model, conds, samples, plan))


def prompt_digest(tensors: dict[str, Tensor]) -> str:
    return digest({key: value for key, value in tensors.items() if key != "c_concat"})


def block_entries(model, conds: dict, samples_BCTHW: Tensor, plan: Plan) -> tuple[dict, ...]:
    """For each block what determines it, apart from the settings of the whole run."""
    entries = {name: condition_tensors(model, cond, samples_BCTHW) for name, cond in conds.items()}
    y_BYTHW = entries["positive"].get("c_concat")
    prompts = {name: prompt_digest(found) for name, found in entries.items()}
    blocks, frame = [], 0
    for count in plan.blocks:
        prompt = sum(frame >= switch for switch in plan.switches)
        blocks.append({"frames": count, "prompt": f"{prompt} ({prompts[f'prompt {prompt}' if prompt else 'positive']})",
                       "y": None if y_BYTHW is None else digest(y_BYTHW[:, :, frame:frame + count])})
        frame += count
    return tuple(blocks)
