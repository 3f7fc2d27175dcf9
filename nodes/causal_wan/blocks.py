"""Block-autoregressive sampling (Self-Forcing, arXiv 2506.08009; LongLive, arXiv 2509.22622).

A video is a sequence of blocks of latent frames. Each block is denoised in a few steps while attending to the cache of
the preceding blocks; a forward pass over the finished block then stores its clean keys there. Layouts: B videos,
C channels, F latent frames, H, W latent height and width.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, repeat, takewhile
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache import CacheLayout, KVCache
from .model import WanParams
from .schedule import FlowStep, predict_x0, renoise

Evaluate = Callable[[Tensor, Tensor, Any, range, KVCache, str], Tensor]


def split_frames(frames: int, block: int, independent_first: bool, short_last: bool) -> tuple[int, ...]:
    """Lengths of the blocks of a video of `frames` latent frames.

    independent_first: the first frame is a block of its own. short_last: the last block may be shorter.
    """
    first = 1 if independent_first else 0
    if frames < 1 or block < 1:
        raise ValueError(f"{frames} latent frames in blocks of {block} were asked for: give at least 1 of each.")
    whole, rest = divmod(frames - first, block)
    if rest and not short_last:
        blocks = [n for n in range(1, frames - first + 1) if (frames - first) % n == 0]
        lengths = [n for n in (first + whole * block, first + (whole + 1) * block) if n > first]
        other = "" if (frames - 1 + first) % block else f"or switch independent_first {'off' if first else 'on'}, "
        after = f" after an independent first frame leave {frames - 1}, which" if first else ""
        raise ValueError(
            f"{frames} latent frames{after} do not split into blocks of {block}. Valid blocks for this length: "
            f"{', '.join(map(str, blocks))}. Valid lengths for blocks of {block}: {' or '.join(map(str, lengths))} "
            f"latent frames. Choose one of these, {other}or allow it with short_last_block.")
    return (1,) * first + (block,) * whole + ((rest,) if rest else ())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that defines a run except the model, the prompts and the noise."""

    blocks: tuple[int, ...]             # latent frames per block, including given ones; see `split_frames`
    steps: tuple[FlowStep, ...]
    first_steps: tuple[FlowStep, ...]   # for the first generated block
    context_noise: float                # timestep label of the pass over a finished block; no noise is added
    window: int                         # latent frames visible to a block, including the sink and itself; -1: all
    sink: int                           # number of leading latent frames that are never evicted
    endless: bool                       # keep the sink's rotary distance within the window length
    switches: tuple[int, ...]           # latent frames from which prompts 1, 2, ... apply
    global_sink: bool                   # the sink keeps the old prompt's keys at a switch
    cfg: float                          # guidance scale; 1: a single branch
    further: int = 0                    # latent frames of each block after `blocks`, without end; 0: none follow

    def __post_init__(self):
        longest = max(*self.blocks, self.further)
        if self.sink < 0:
            raise ValueError(f"sink is {self.sink}: give 0 or more latent frames.")
        if self.window != -1 and self.window < self.sink + longest:
            raise ValueError(f"The window of {self.window} latent frames is smaller than the sink and a block, "
                             f"{self.sink} + {longest}: give at least {self.sink + longest}, or -1 for no window.")
        if self.further and self.window == -1:
            raise ValueError("A video until stopped needs a window, or its cache would grow without end: give as many "
                             f"latent frames as the model was trained with, at least {self.sink + longest}.")
        if any(a >= b for a, b in zip((0, *self.switches), (*self.switches, self.frames))):
            raise ValueError(f"The prompts change at latent frames {list(self.switches)}: give rising frames from 1 to "
                             f"{self.frames - 1}, the last one of this video.")
        if not 0 <= self.context_noise <= 1000:
            raise ValueError(f"context_noise is {self.context_noise}: it is a timestep from 0 (clean) to 1000.")

    @property
    def frames(self) -> int | float:
        """Latent frames of the video; infinite until it is stopped."""
        return inf if self.further else sum(self.blocks)

    def lengths(self) -> Iterator[int]:
        """Latent frames of each block in turn."""
        return chain(self.blocks, repeat(self.further) if self.further else ())

    def edges(self, frames: int | float) -> list[int]:
        """The first latent frame of each block, and the end of the last, as far as frame `frames`."""
        return list(takewhile(lambda edge: edge <= frames, accumulate(self.lengths(), initial=0)))

    @property
    def capacity(self) -> int:
        """Number of latent frames that the cache holds."""
        return self.frames if self.window == -1 else min(self.window, self.frames)

    @property
    def branches(self) -> int:
        return 1 if self.cfg == 1 else 2

    def layout(self, params: WanParams, height: int, width: int) -> CacheLayout:
        return params.cache_layout(capacity=self.capacity, sink=min(self.sink, self.capacity), height=height,
                                   width=width, relative_sink=self.endless)

    def cache_bytes(self, params: WanParams, height: int, width: int, batch: int, itemsize: int) -> int:
        """Bytes of the caches of all guidance branches, computed before anything is allocated."""
        return self.branches * self.layout(params, height, width).nbytes(batch, itemsize)

    def leading_blocks(self, frames: int) -> int:
        """Number of blocks that the first `frames` latent frames fill."""
        edges = self.edges(frames)
        if edges[-1] != frames:
            edges = self.edges(min(self.frames - 1, edges[-1] + 3 * max(*self.blocks, self.further)))
            raise ValueError(f"{frames} given latent frames end inside a block. Give {', '.join(map(str, edges[1:]))} "
                             "frames.")
        return len(edges) - 1


def guided_x0(x: Tensor, sigma: float, flows: Sequence[Tensor], cfg: float) -> Tensor:
    """x0 by classifier-free guidance (arXiv 2207.12598) from a positive and a negative flow, or from a single flow."""
    if len(flows) == 1:
        return predict_x0(x, flows[0], sigma)
    positive, negative = flows
    return predict_x0(x, negative + cfg * (positive - negative), sigma)


def last_blocks(blocks: list[Tensor], frames: int) -> list[Tensor]:
    """The fewest last blocks [B, C, F, H, W] that together hold `frames` frames, or all blocks if they hold fewer."""
    count, held = 0, 0
    while held < frames and count < len(blocks):
        count += 1
        held += blocks[-count].shape[2]
    return blocks[-count:]


class Block(NamedTuple):
    index: int
    start: int             # first latent frame
    latent_BCFHW: Tensor


@dataclass(kw_only=True)
class BlockLoop:
    """One run. `evaluate(x, t_BF, prompt, frame_ids, cache, sink_mode)` returns the flow, as `CausalWan.forward` does.

    `project(number)` returns the prompt as `evaluate` takes it (such as its cross-attention keys) for each guidance
    branch, positive first; it is called when a prompt begins.
    `noise(start, count, step)` returns a block's initial noise at step 0 and the noise added before each later step.
    `on_step(block, step, x0)` is called after every denoising step and may raise to end the run.
    `guide(x, sigma, flows, prompts)` returns the x0 of a noisy block from its flow in each branch.
    `change(block, start)` is called before each block is made. It returns a prompt that begins there in place of a
    planned one, in the form of `project`, or None.
    """

    plan: Plan
    evaluate: Evaluate
    caches: Sequence[KVCache]                 # one per branch
    project: Callable[[int], Sequence[Any]]
    noise: Callable[[int, int, int], Tensor]
    y_BYFHW: Tensor | None                    # mask and image latent of all frames, I2V models only
    on_step: Callable[[int, int, Tensor], None]
    guide: Callable[[Tensor, float, Sequence[Tensor], Sequence[Any]], Tensor] | None = None  # None: plain CFG
    change: Callable[[int, int], Sequence[Any] | None] | None = None

    def __post_init__(self):
        if len(self.caches) != self.plan.branches:
            raise ValueError(f"{len(self.caches)} caches for {self.plan.branches} guidance branches: give one each.")
        if self.y_BYFHW is not None and not self.plan.further and self.y_BYFHW.shape[2] != self.plan.frames:
            raise ValueError(f"The image condition y has {self.y_BYFHW.shape[2]} latent frames, the video "
                             f"{self.plan.frames}: make both of one length.")

    def flows(self, prompts: Sequence[Any], x_BCFHW: Tensor, t_BF: Tensor, start: int,
              sink_mode: str) -> list[Tensor]:
        """Flow of the frames from `start` on in each branch; fills the caches."""
        frame_ids = range(start, start + x_BCFHW.shape[2])
        if self.y_BYFHW is not None:
            last = self.y_BYFHW.shape[2] - 1  # a video until stopped goes on with the condition of the last frame
            y_BYFHW = self.y_BYFHW[:, :, [min(frame, last) for frame in frame_ids]]
            x_BCFHW = torch.cat((x_BCFHW, y_BYFHW.to(x_BCFHW)), dim=1)
        return [self.evaluate(x_BCFHW, t_BF, prompt, frame_ids, cache, sink_mode)
                for prompt, cache in zip(prompts, self.caches, strict=True)]

    def absorb(self, prompts: Sequence[Any], x_BCFHW: Tensor, timestep: float, start: int, sink_mode: str) -> None:
        """Fill the caches with the keys of finished frames."""
        t_BF = x_BCFHW.new_full((x_BCFHW.shape[0], x_BCFHW.shape[2]), timestep, dtype=torch.float32)
        self.flows(prompts, x_BCFHW, t_BF, start, sink_mode)

    def predict(self, prompts: Sequence[Any], x_BCFHW: Tensor, step: FlowStep, start: int,
                held_BCKHW: Tensor | None) -> Tensor:
        """x0 of a noisy block; frames of `held_BCKHW` (at the start of the video) stay as given, at timestep 0."""
        count = x_BCFHW.shape[2]
        held = 0 if held_BCKHW is None else max(0, min(count, held_BCKHW.shape[2] - start))
        t_BF = x_BCFHW.new_full((x_BCFHW.shape[0], count), step.timestep, dtype=torch.float32)
        if held:
            t_BF[:, :held] = 0
            x_BCFHW = torch.cat((held_BCKHW[:, :, start:start + held], x_BCFHW[:, :, held:]), dim=2)
        flows = self.flows(prompts, x_BCFHW, t_BF, start, "write")
        if self.guide is None:
            x0_BCFHW = guided_x0(x_BCFHW, step.sigma, flows, self.plan.cfg)
        else:
            x0_BCFHW = self.guide(x_BCFHW, step.sigma, flows, prompts)
        if held:
            x0_BCFHW[:, :, :held] = held_BCKHW[:, :, start:start + held]
        return x0_BCFHW

    def denoise(self, prompts: Sequence[Any], index: int, start: int, count: int, steps: tuple[FlowStep, ...],
                held_BCKHW: Tensor | None) -> Tensor:
        """Denoise one block from fresh noise."""
        x_BCFHW = self.noise(start, count, 0)
        for number, step in enumerate(steps):
            x0_BCFHW = self.predict(prompts, x_BCFHW, step, start, held_BCKHW)
            self.on_step(index, number, x0_BCFHW)
            if number + 1 < len(steps):
                x_BCFHW = renoise(x0_BCFHW, self.noise(start, count, number + 1), steps[number + 1].sigma)
        return x0_BCFHW

    def switch_prompt(self, prompts: Sequence[Any], start: int, recent_BCFHW: Tensor) -> None:
        """Recompute the cache under new prompts, in one forward pass over the latest frames (LongLive).

        With `global_sink` the sink keeps its keys once the video is longer than the window; otherwise the oldest frames
        of the pass become the sink.
        """
        plan = self.plan
        keep_sink = plan.global_sink and start > plan.capacity
        count = min(start, plan.capacity - (plan.sink if keep_sink else 0))
        self.absorb(prompts, recent_BCFHW[:, :, -count:], plan.context_noise, start - count,
                    "write" if keep_sink else "replace")

    def run(self, context_BCPHW: Tensor | None, held_BCKHW: Tensor | None,
            recall: Callable[[int], Tensor | None] | None) -> Iterator[Block]:
        """Yield the blocks as they are finished.

        context_BCPHW: frames to continue from, whole blocks; they are not yielded. held_BCKHW: given frames that are
        part of the first generated blocks, for models trained this way. recall(index): a block that an interrupted run
        of the same plan has finished, or None; it refills the caches exactly and is yielded like the others.
        """
        plan = self.plan
        given = plan.leading_blocks(0 if context_BCPHW is None else context_BCPHW.shape[2])
        number, start = 0, 0
        prompts = self.project(number)
        recent: list[Tensor] = []  # finished blocks whose frames the next prompt switch needs
        for index, count in enumerate(plan.lengths()):
            if index >= given:
                reached = sum(start >= frame for frame in plan.switches)
                changed = self.change(index, start) if self.change else None
                if changed is None and reached > number:
                    changed = self.project(reached)
                number, prompts = reached, changed or prompts
                if changed and start:
                    self.switch_prompt(prompts, start, torch.cat(recent, dim=2))
            if index < given:
                latent = context_BCPHW[:, :, start:start + count]
            else:
                latent = None if recall is None else recall(index)
                if latent is None:
                    steps = plan.first_steps if index == given else plan.steps
                    latent = self.denoise(prompts, index, start, count, steps, held_BCKHW)
                yield Block(index, start, latent)
            if start + count < plan.frames:
                timestep = 0 if index < given else plan.context_noise
                self.absorb(prompts, latent, timestep, start, "write")
            more = self.change is not None or number < len(plan.switches)
            recent = last_blocks([*recent, latent], plan.capacity) if more else []
            start += count
