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

from .rope import Rotation, make_rotation, rotate


class Segment(NamedTuple):
    """Frames of a forward pass that occupy adjacent slots."""

    source: int  # first frame within the forward pass
    slot: int
    length: int


class Placement(NamedTuple):
    """Where a forward pass writes, and what it attends to."""

    segments: tuple[Segment, ...]
    attended: int                  # slots 0 .. attended - 1
    sink_start: int | None         # new rotary position of the first sink frame, None: unchanged


def slot_of(frame: int, capacity: int, sink: int) -> int:
    """Slot of an absolute latent frame index."""
    return frame if frame < capacity else sink + (frame - sink) % (capacity - sink)


def write_segments(start: int, count: int, capacity: int, sink: int, sink_mode: str) -> tuple[Segment, ...]:
    """Slots of the frames start .. start + count - 1, adjacent ones merged.

    sink_mode "write": frames below `sink` go to the sink slots. "replace": the first `sink` frames of this forward pass
    become the sink, regardless of their index.
    """
    slots = [source if sink_mode == "replace" and source < sink else slot_of(start + source, capacity, sink)
             for source in range(count)]
    if len(set(slots)) != count:
        raise ValueError(f"{count} latent frames in one evaluation do not fit a cache of {capacity} frames with "
                         f"{sink} sink frames: give at most {capacity - sink}, or a larger window.")
    segments = []
    for source, slot in enumerate(slots):
        last = segments[-1] if segments else None
        if last and slot == last.slot + last.length:
            segments[-1] = last._replace(length=last.length + 1)
        else:
            segments.append(Segment(source, slot, 1))
    return tuple(segments)


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
    """Keys and values [B, capacity * frame_tokens, C] of every layer, for one guidance branch of one sampler call."""

    def __init__(self, layout: CacheLayout, batch: int, dtype: torch.dtype, device):
        self.layout = layout
        self.sink_start = 0
        self.turned: tuple[range, Rotation] | None = None  # of the latest forward pass; shared by all steps of a block

        def allocate(frames: int) -> list[Tensor]:
            shape = (batch, frames * layout.frame_tokens, layout.width)
            return [torch.empty(shape, dtype=dtype, device=device) for _ in range(layout.layers)]

        self.keys = allocate(layout.capacity)
        self.values = allocate(layout.capacity)
        self.sink_keys = allocate(layout.sink) if layout.relative_sink else None  # not rotated

    def tensors(self) -> list[Tensor]:
        return [*self.keys, *self.values, *(self.sink_keys or [])]

    def rotation(self, frame_ids: range, height: int, width: int, head_dim: int, device) -> Rotation:
        """`make_rotation`, cached for the next forward pass over the same frames."""
        if self.turned is None or self.turned[0] != frame_ids:
            self.turned = frame_ids, make_rotation(frame_ids, height, width, head_dim, device)
        return self.turned[1]

    def place(self, start: int, count: int, sink_mode: str) -> Placement:
        """Plan the forward pass over the frames start .. start + count - 1 (see `write_segments`)."""
        layout = self.layout
        segments = write_segments(start, count, layout.capacity, layout.sink, sink_mode)
        end = start + count
        # The sink is positioned as if the frames between it and the window had never existed.
        sink_start = max(0, end - layout.capacity) if layout.relative_sink else 0
        moved = sink_start != self.sink_start
        self.sink_start = sink_start
        return Placement(segments, min(end, layout.capacity), sink_start if moved else None)

    def write(self, layer: int, raw_key: Tensor, key: Tensor, value: Tensor, placement: Placement,
              sink_rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """Store one layer's keys and values [B, L, C] of a forward pass; returns views of everything it attends to."""
        tokens, sink = self.layout.frame_tokens, self.layout.sink
        keys, values = self.keys[layer], self.values[layer]
        for source, slot, length in placement.segments:
            given = slice(source * tokens, (source + length) * tokens)
            kept = slice(slot * tokens, (slot + length) * tokens)
            keys[:, kept] = key[:, given]
            values[:, kept] = value[:, given]
            in_sink = min(length, sink - slot)
            if self.sink_keys is not None and in_sink > 0:
                raw = raw_key[:, source * tokens:(source + in_sink) * tokens]
                self.sink_keys[layer][:, slot * tokens:(slot + in_sink) * tokens] = raw
        if sink_rotation is not None:
            keys[:, :sink * tokens] = rotate(self.sink_keys[layer], sink_rotation, self.layout.heads)
        attended = placement.attended * tokens
        return keys[:, :attended], values[:, :attended]
