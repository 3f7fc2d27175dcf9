"""Key-value cache of a causal video transformer: a preallocated ring of latent frames behind fixed sink frames.

Keys carry their absolute rotary position and softmax is order-invariant, so a new frame can overwrite the oldest one in
place: nothing is rolled or copied, and the valid keys are always the first slots. The contents are the same as in the
rolling caches of Self-Forcing (arXiv 2506.08009) and LongLive (arXiv 2509.22622): the first `sink` frames and the last
`capacity - sink` ones, including the current block.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.fused import rotate
from .rope import make_rotation


class LayerCache(NamedTuple):
    """One layer's keys and values [B, capacity * frame_tokens, C], and the sink's keys before their rotation, which
    only relative sinks keep."""

    keys_BKC: Tensor
    values_BKC: Tensor
    sink_BKC: Tensor | None


class Window(NamedTuple):
    """A forward pass: where its frames are written, and what it attends to. All passes with a full window differ in
    the values of the tensors alone, so that a compiled network or a recorded graph serves them all."""

    rotation_LP2: Tensor
    slots_F: Tensor | None = None                # slot of each frame; None: no cache
    attended: int = 0                            # tokens of a ring, from the first one on
    sink_frames_S: Tensor | None = None          # those of the pass that become part of a relative sink
    layers: tuple[LayerCache, ...] | None = None


def slot_of(frame: int, capacity: int, sink: int) -> int:
    """Slot of an absolute latent frame index."""
    return frame if frame < capacity else sink + (frame - sink) % (capacity - sink)


def slots_of(start: int, count: int, capacity: int, sink: int, sink_mode: str) -> list[int]:
    """Slots of the frames start .. start + count - 1.

    sink_mode "write": frames below `sink` go to the sink slots. "replace": the first `sink` frames of this forward pass
    become the sink, regardless of their index.
    """
    slots = [source if sink_mode == "replace" and source < sink else slot_of(start + source, capacity, sink)
             for source in range(count)]
    if len(set(slots)) != count:
        raise ValueError(f"{count} latent frames in one evaluation do not fit a cache of {capacity} frames with "
                         f"{sink} sink frames: give at most {capacity - sink}, or a larger window.")
    return slots


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """Size of a cache. `relative_sink`: sink keys are re-rotated when the window moves, so that their distance to
    the current block stays within the training range for videos of any length."""

    layers: int
    width: int           # channels of a key
    heads: int
    capacity: int        # latent frames held, including the sink
    sink: int
    frame_tokens: int    # tokens of one latent frame
    relative_sink: bool

    def nbytes(self, batch: int, itemsize: int) -> int:
        """Bytes of one cache for `batch` videos and `itemsize` bytes per element."""
        frames = 2 * self.capacity + (self.sink if self.relative_sink else 0)
        return self.layers * batch * frames * self.frame_tokens * self.width * itemsize


class KVCache:
    """Keys and values of every layer, for one guidance branch of one sampler call. Their tensors stay the same from the
    first forward pass to the last."""

    def __init__(self, layout: CacheLayout, batch: int, dtype: torch.dtype, device):
        self.layout = layout
        self.sink_start = 0  # position of the first sink frame
        self.opened: tuple[tuple, Window] | None = None

        def allocate(frames: int) -> Tensor:
            return torch.empty(batch, frames * layout.frame_tokens, layout.width, dtype=dtype, device=device)

        self.layers = tuple(
            LayerCache(allocate(layout.capacity), allocate(layout.capacity),
                       allocate(layout.sink) if layout.relative_sink else None) for _ in range(layout.layers))

    def tensors(self) -> list[Tensor]:
        return [tensor for layer in self.layers for tensor in layer if tensor is not None]

    def open(self, frame_ids: range, sink_mode: str, rows: int, columns: int) -> Window:
        """Prepare a forward pass over consecutive frames (see `slots_of`), each of rows x columns tokens. All steps of
        a block share the result."""
        key = frame_ids, sink_mode
        if self.opened is None or self.opened[0] != key:
            self.opened = key, self._open(frame_ids, sink_mode, rows, columns)
        return self.opened[1]

    def _open(self, frame_ids: range, sink_mode: str, rows: int, columns: int) -> Window:
        layout, device = self.layout, self.layers[0].keys_BKC.device
        head_dim = layout.width // layout.heads
        slots = slots_of(frame_ids[0], len(frame_ids), layout.capacity, layout.sink, sink_mode)
        end = frame_ids[-1] + 1
        # The sink is positioned as if the frames between it and the window had never existed.
        start = max(0, end - layout.capacity) if layout.relative_sink else 0
        if start != self.sink_start:
            self.sink_start = start
            rotation_LP2 = make_rotation(range(start, start + layout.sink), rows, columns, head_dim, device)
            for layer in self.layers:
                layer.keys_BKC[:, :len(rotation_LP2)] = rotate(layer.sink_BKC, rotation_LP2, layout.heads)
        sink_frames = [source for source, slot in enumerate(slots) if layout.relative_sink and slot < layout.sink]
        return Window(make_rotation(frame_ids, rows, columns, head_dim, device), torch.tensor(slots, device=device),
                      min(end, layout.capacity) * layout.frame_tokens,
                      torch.tensor(sink_frames, device=device) if sink_frames else None, self.layers)
