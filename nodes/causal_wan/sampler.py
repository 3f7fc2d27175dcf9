"""The block loop as a ComfyUI sampler, with its memory management, patches, wrappers, interrupts and previews.

Layouts: B videos, C channels, T latent frames of the video, F those of one forward pass, H, W latent height and width.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ..common.core_model import inference_dtype
from .attention import ContextKeys
from .blocks import BlockLoop, Plan, guided_x0
from .cache import KVCache
from .conditioning import CLAMP, StartFrames
from .schedule import predict_x0

GUIDANCE_FUNCTIONS = ("sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function")


class BranchPrompt(NamedTuple):
    """A prompt in one guidance branch."""

    branch: int                     # 0: positive, 1: negative, as in core
    conds: list                     # core's entries for the prompt
    keys: tuple[ContextKeys, ...]   # one per cross-attention layer

    @property
    def uuid(self):
        """Core's identifier of the prompt."""
        return self.conds[0]["uuid"]


class Network:
    """Calls the network of a BaseModel as core's samplers do: through the wrappers of other packs."""

    def __init__(self, model, model_options: dict, device):
        self.model, self.options, self.device, self.dtype = model, model_options, device, inference_dtype(model)

    def flow(self, x_BCFHW: Tensor, t_BF: Tensor, prompt: BranchPrompt, frame_ids: range, cache: KVCache,
             sink_mode: str) -> Tensor:
        """Flow in float32."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        branches = [prompt.branch]
        options = {**self.options["transformer_options"], "cond_or_uncond": branches, "uuids": [prompt.uuid],
                   "sigmas": t_BF.amax(1) / 1000}
        block = {"c_crossattn": prompt.keys, "transformer_options": options, "frame_ids": frame_ids, "cache": cache,
                 "sink_mode": sink_mode}
        wrapper = self.options.get("model_function_wrapper")
        if wrapper is None:
            return self._wrapped(x_BCFHW, t_BF, **block)
        return wrapper(self._wrapped, {"input": x_BCFHW, "timestep": t_BF, "c": block, "cond_or_uncond": branches})

    def _wrapped(self, x_BCFHW, t_BF, c_crossattn, transformer_options, **block):
        wrappers = get_all_wrappers(WrappersMP.APPLY_MODEL, transformer_options)
        executor = WrapperExecutor.new_class_executor(self._apply, self.model, wrappers)
        return executor.execute(x_BCFHW, t_BF, None, c_crossattn, None, transformer_options, **block)

    def _apply(self, x_BCFHW, t_BF, c_concat, c_crossattn, control, transformer_options, cache, frame_ids, sink_mode,
               **block):
        network, x_BCFHW = self.model.diffusion_model, x_BCFHW.to(self.dtype)
        # Opened here, a compiled network reads tensors alone; the rest is for the wrappers of other packs.
        window = network.open(x_BCFHW, frame_ids, cache, sink_mode)
        return network(x_BCFHW, t_BF, c_crossattn, transformer_options=transformer_options, window=window, cache=cache,
                       frame_ids=frame_ids, sink_mode=sink_mode, **block).float()

    def guide(self, x_BCFHW: Tensor, sigma: float, flows, prompts: list[BranchPrompt], cfg: float) -> Tensor:
        """Guided x0, using the guidance functions on the MODEL if there are any."""
        if not any(self.options.get(name) for name in GUIDANCE_FUNCTIONS):
            return guided_x0(x_BCFHW, sigma, flows, cfg)
        denoised = [predict_x0(x_BCFHW, flow, sigma) for flow in flows]
        conds = [prompt.conds for prompt in prompts]
        if len(flows) == 1:  # as in core without a negative pass
            denoised, conds = [*denoised, torch.zeros_like(x_BCFHW)], [*conds, None]
        sigma_B = x_BCFHW.new_full((len(x_BCFHW),), sigma)
        for function in self.options.get("sampler_pre_cfg_function", []):
            denoised = function({"conds": conds, "conds_out": denoised, "cond_scale": cfg, "timestep": sigma_B,
                                 "input": x_BCFHW, "sigma": sigma_B, "model": self.model,
                                 "model_options": self.options})
        return comfy.samplers.cfg_function(self.model, *denoised, cfg, x_BCFHW, sigma_B, self.options, *conds)

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

    The first `start.frames` latent frames are given. SIGMAS are ignored: `plan` defines the steps. `recall` as in
    `BlockLoop.run`. deliver(index, latent_BCFHW) receives every part of the video in order, given frames first (index
    None); after a block it may return True to end the video there. change(index, start) returns the CONDITIONING that
    begins with a block, or None. With `whole` the result is the video's latent, otherwise only the last block.
    """

    def __init__(self, plan: Plan, start: StartFrames | None, draw: Callable[[int, int, int], Tensor],
                 recall: Callable[[int], Tensor | None], deliver: Callable[[int | None, Tensor], bool], whole: bool,
                 change: Callable[[int, int], list | None] | None = None):
        self.plan, self.start, self.draw, self.change = plan, start, draw, change
        self.recall, self.deliver, self.whole = recall, deliver, whole

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        """Called by core's guiders; noise and latent_image [B, C, T, H, W], of which only the given frames are used."""
        plan, model, device = self.plan, guider.inner_model, noise.device
        batch, _, _, height, width = noise.shape
        network = Network(model, extra_args["model_options"], device)
        caches = [KVCache(plan.layout(model.wan_params, height, width), batch, network.dtype, device)
                  for _ in range(plan.branches)]

        def branches(positive: list) -> list[BranchPrompt]:
            conds = [positive, guider.conds.get("negative")][:plan.branches]
            return [BranchPrompt(branch, cond, network.project(cond[0]["model_conds"], batch))
                    for branch, cond in enumerate(conds)]

        def project(number: int) -> list[BranchPrompt]:
            return branches(guider.conds[f"prompt {number}" if number else "positive"])

        def change(index: int, start: int) -> list[BranchPrompt] | None:
            found = self.change(index, start)
            if found is None:
                return None
            # the text encoder may have taken the model's place in memory
            comfy.sampler_helpers.prepare_sampling(guider.model_patcher, noise.shape, guider.conds,
                                                   guider.model_options)
            conds = {"positive": comfy.sampler_helpers.convert_cond(found)}
            return branches(comfy.samplers.process_conds(model, noise, conds, device, latent_image,
                                                         denoise_mask)["positive"])

        def recall(index: int):
            latent = self.recall(index)
            return None if latent is None else latent.to(device)

        context = held = None
        if self.start is not None and self.start.frames:
            given = latent_image[:, :, :self.start.frames]
            context, held = (None, given) if self.start.mechanism == CLAMP else (given, None)
        y = guider.conds["positive"][0]["model_conds"].get("c_concat")
        loop = BlockLoop(plan=plan, evaluate=network.flow, caches=caches, project=project,
                         noise=lambda *place: self.draw(*place).to(device),
                         y_BYFHW=None if y is None else y.process_cond(batch_size=batch, area=None).cond.to(device),
                         on_step=self._progress(callback),
                         guide=lambda *block: network.guide(*block, plan.cfg),
                         change=change if self.change else None)
        parts = []

        def deliver(index: int | None, latent_BCFHW: Tensor) -> bool:
            if not latent_BCFHW.isfinite().all():
                raise ValueError(f"Block {index} has NaN or infinite values: numbers outgrew {network.dtype}. Load the "
                                 "model with weight_dtype bf16 or fp32, or look at the LoRAs and patches on it.")
            parts[:] = [*parts, latent_BCFHW] if self.whole else [latent_BCFHW]
            return self.deliver(index, latent_BCFHW)

        if context is not None:
            deliver(None, context[:, :, :1] if self.start.still else context)
        for block in loop.run(context, held, recall):
            if deliver(block.index, block.latent_BCFHW):
                break
        return torch.cat(parts, dim=2)

    def _progress(self, callback):
        """Progress callback over the steps of all blocks, or of each block until stopped; the preview shows the current
        block."""
        plan, first = self.plan, given_blocks(self.plan, self.start)
        total = count_steps(plan, first)

        def on_step(block: int, step: int, x0_BCFHW: Tensor) -> None:
            done = step
            if block > first and not plan.further:
                done += len(plan.first_steps) + (block - first - 1) * len(plan.steps)
            if callback:
                callback(done, x0_BCFHW, x0_BCFHW, total)

        return on_step


def given_blocks(plan: Plan, start: StartFrames | None) -> int:
    """Number of leading blocks that go into the cache unchanged."""
    return 0 if start is None or start.mechanism == CLAMP else plan.leading_blocks(start.frames)


def count_steps(plan: Plan, given: int) -> int:
    """Steps of the run, or of one block of a run until stopped."""
    if plan.further:
        return max(len(plan.first_steps), len(plan.steps))
    return len(plan.first_steps) + (len(plan.blocks) - given - 1) * len(plan.steps)
