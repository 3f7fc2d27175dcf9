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
from ...causal_wan.cache import CacheLayout, KVCache, Window, slots_of
from ...causal_wan.rope import make_rotation
from ...causal_wan.schedule import FlowStep, renoise
from ...common.fused import rotate


class LayerSlots:
    """One layer's keys and values: a tensor [B, frame_tokens, C] for each slot, exchanged and never overwritten."""

    def __init__(self, keys: list[Tensor | None], values: list[Tensor | None], sinks: list[Tensor | None],
                 writable: bool = True):
        self.keys, self.values, self.sinks, self.writable = keys, values, sinks, writable

    def extend(self, raw_key: Tensor, key: Tensor, value: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """Everything that a forward pass attends to: what is held, with the keys and values [B, L, C] of the pass in
        their slots. `raw_key` is the key before its rotation, for relative sinks."""
        keys, values, sinks = list(self.keys), list(self.values), list(self.sinks)
        tokens = key.shape[1] // len(window.slots_F)
        for slot, *frame in zip(window.slots_F, *(each.split(tokens, dim=1) for each in (raw_key, key, value))):
            if slot < len(sinks):
                sinks[slot] = frame[0]
            keys[slot], values[slot] = frame[1:]
        if self.writable:
            self.keys, self.values, self.sinks = keys, values, sinks
        held = window.attended // tokens
        return torch.cat(keys[:held], dim=1), torch.cat(values[:held], dim=1)

    def frozen(self) -> LayerSlots:
        return LayerSlots(self.keys, self.values, self.sinks, writable=False)


class RolloutCache(KVCache):
    """The contents of a `KVCache` in tensors that are never overwritten. A `frozen` one therefore shows the backward
    pass (and gradient checkpointing) what the forward pass saw; what is written to it is seen by that pass alone."""

    def __init__(self, layout: CacheLayout, device: torch.device | str):
        self.layout, self.device, self.sink_start = layout, device, 0
        sink = layout.sink if layout.relative_sink else 0
        self.layers = tuple(LayerSlots([None] * layout.capacity, [None] * layout.capacity, [None] * sink)
                            for _ in range(layout.layers))

    def frozen(self) -> RolloutCache:
        view = copy.copy(self)
        view.layers = tuple(layer.frozen() for layer in self.layers)
        return view

    def tensors(self) -> list[Tensor]:
        return [tensor for layer in self.layers for slots in (layer.keys, layer.values, layer.sinks)
                for tensor in slots if tensor is not None]

    def open(self, frame_ids: range, sink_mode: str, rows: int, columns: int) -> Window:
        layout, head_dim = self.layout, self.layout.width // self.layout.heads
        slots = slots_of(frame_ids[0], len(frame_ids), layout.capacity, layout.sink, sink_mode)
        end = frame_ids[-1] + 1
        start = max(0, end - layout.capacity) if layout.relative_sink else 0
        if start != self.sink_start:  # as in `KVCache`
            self.sink_start = start
            rotation_LP2 = make_rotation(range(start, start + layout.sink), rows, columns, head_dim, self.device)
            for layer in self.layers:
                turned = rotate(torch.cat(layer.sinks, dim=1), rotation_LP2, layout.heads)
                layer.keys = [*turned.split(layout.frame_tokens, dim=1), *layer.keys[layout.sink:]]
        return Window(make_rotation(frame_ids, rows, columns, head_dim, self.device), slots,
                      min(end, layout.capacity) * layout.frame_tokens, None, self.layers)


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
