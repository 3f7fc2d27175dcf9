"""Rollouts with a gradient: the sampler's block loop, ended at one denoising step, over a cache that backward can use.

Self-Forcing (arXiv 2506.08009): steps before the exit step run without gradient, each followed by fresh noise; the exit
step's x0 is the block; then a pass over it without gradient fills the cache. LongLive (arXiv 2509.22622): a rollout
goes on over several updates with its caches kept, and the prompt changes on the way.
"""
from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...causal_wan.blocks import BlockLoop
from ...causal_wan.cache import CacheLayout, KVCache, Placement
from ...causal_wan.rope import Rotation, rotate
from ...causal_wan.schedule import FlowStep, renoise


class RolloutCache(KVCache):
    """A `KVCache` that never overwrites a tensor: every slot holds a tensor of its own, which is exchanged. A `frozen`
    one therefore shows the backward pass (and gradient checkpointing) what the forward pass saw."""

    def __init__(self, layout: CacheLayout):
        self.layout, self.sink_start, self.turned = layout, 0, None
        self.writable = True

        def slots(frames: int) -> list[list[Tensor | None]]:
            return [[None] * frames for _ in range(layout.layers)]

        self.keys, self.values = slots(layout.capacity), slots(layout.capacity)  # [B, frame_tokens, C] each
        self.sink_keys = slots(layout.sink) if layout.relative_sink else None    # not rotated

    def frozen(self) -> RolloutCache:
        """The contents as they are now. What is written to it is seen by that forward pass alone, with gradient."""
        view = copy.copy(self)
        view.keys, view.values = list(self.keys), list(self.values)
        view.sink_keys = list(self.sink_keys) if self.sink_keys is not None else None
        view.writable = False
        return view

    def tensors(self) -> list[Tensor]:
        held = [*self.keys, *self.values, *(self.sink_keys or [])]
        return [tensor for slots in held for tensor in slots if tensor is not None]

    def write(self, layer: int, raw_key: Tensor, key: Tensor, value: Tensor, placement: Placement,
              sink_rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        tokens, sink = self.layout.frame_tokens, self.layout.sink
        keys, values = list(self.keys[layer]), list(self.values[layer])
        sinks = None if self.sink_keys is None else list(self.sink_keys[layer])
        for source, slot, length in placement.segments:
            for i in range(length):
                given = slice((source + i) * tokens, (source + i + 1) * tokens)
                keys[slot + i], values[slot + i] = key[:, given], value[:, given]
                if sinks is not None and slot + i < sink:
                    sinks[slot + i] = raw_key[:, given]
        if sink_rotation is not None:
            keys[:sink] = rotate(torch.cat(sinks, dim=1), sink_rotation, self.layout.heads).split(tokens, dim=1)
        if self.writable:
            self.keys[layer], self.values[layer] = keys, values
            if sinks is not None:
                self.sink_keys[layer] = sinks
        return torch.cat(keys[:placement.attended], dim=1), torch.cat(values[:placement.attended], dim=1)


@dataclass(kw_only=True)
class Rollout(BlockLoop):
    """A `BlockLoop` over `RolloutCache`s whose blocks end at the denoising step number `exit`.

    Only the last step of blocks at `learn_from` or later has a gradient; None: no block has. `made` holds the blocks
    [B, C, F, H, W] with their gradients until `take` hands them out; the loop itself goes on without.
    """

    exit: int = 0
    learn_from: int | None = None
    made: list[Tensor] = field(default_factory=list)

    def __post_init__(self):
        super().__post_init__()
        self.position = 0          # latent frames handed out
        self.context = self.running = None

    def denoise(self, prompts, index: int, start: int, count: int, steps: tuple[FlowStep, ...],
                held_BCKHW: Tensor | None) -> Tensor:
        last = steps[self.exit]
        with torch.no_grad():
            if self.exit:
                x0_BCFHW = super().denoise(prompts, index, start, count, steps[:self.exit], held_BCKHW)
                x_BCFHW = renoise(x0_BCFHW, self.noise(start, count, self.exit), last.sigma)
            else:
                x_BCFHW = self.noise(start, count, 0)
        with torch.set_grad_enabled(self.learn_from is not None and start >= self.learn_from):
            frozen = replace(self, caches=[cache.frozen() for cache in self.caches])
            x0_BCFHW = frozen.predict(prompts, x_BCFHW, last, start, held_BCKHW)
        self.made.append(x0_BCFHW)
        return x0_BCFHW.detach()

    @torch.no_grad()
    def absorb(self, *arguments) -> None:
        super().absorb(*arguments)

    def start(self, context_BCPHW: Tensor | None, held_BCKHW: Tensor | None) -> Rollout:
        """Begin; see `BlockLoop.run`. Blocks are made as `take` asks for them; it hands out the context first."""
        self.context, self.running = context_BCPHW, self.run(context_BCPHW, held_BCKHW, None)
        return self

    def take(self, frames: int) -> Tensor:
        """The next `frames` latent frames (whole blocks) [B, C, frames, H, W]."""
        taken, held = [], 0
        if self.context is not None and not self.position:
            taken, held = [self.context], self.context.shape[2]
        while held < frames:
            next(self.running)
            taken.append(self.made.pop())
            held += taken[-1].shape[2]
        if held > frames:
            raise ValueError(f"{frames} latent frames from frame {self.position} on are not whole blocks of "
                             f"{list(self.plan.blocks)}. Give whole blocks.")
        self.position += frames
        return torch.cat(taken, dim=2)
