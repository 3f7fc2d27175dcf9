"""The ring cache compared with the official code's rolling cache, reimplemented with copies."""

import pytest
import torch
from block_loop_stub import make_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_causal_wan import official_cache
from stillmotion.nodes.causal_wan.attention import SelfAttention, Step
from stillmotion.nodes.causal_wan.blocks import BlockLoop
from stillmotion.nodes.causal_wan.cache import CacheLayout, KVCache, slot_of, slots_of
from stillmotion.nodes.causal_wan.rope import make_rotation
from stillmotion.nodes.common.fused import rotate, store

TOKENS = 2


class Layers:
    """Layer classes that change nothing."""

    Linear = RMSNorm = torch.nn.Identity


class RollingCache:
    """Self-Forcing's and LongLive's bookkeeping: one slot per frame, shifted by copying."""

    def __init__(self, capacity, sink, windowed):
        self.keys = torch.zeros(capacity)
        self.sink, self.capacity, self.windowed = sink, capacity, windowed
        self.local_end = self.global_end = 0

    def forward(self, start, new, protect):
        count, end, sink = len(new), start + len(new), self.sink
        full = self.local_end + count > self.capacity
        if self.windowed and end > self.global_end and full:
            evicted = self.local_end + count - self.capacity
            kept = self.local_end - evicted - sink
            self.keys[sink:sink + kept] = self.keys[sink + evicted:sink + evicted + kept].clone()
            self.local_end += end - self.global_end - evicted
        else:
            self.local_end += end - self.global_end
        first = self.local_end - count
        write = max(first, sink) if protect and end <= self.global_end and start > 0 else first
        self.keys[write:self.local_end] = new[write - first:]
        self.global_end = end
        window = self.keys[max(sink, self.local_end - (self.capacity - sink)):self.local_end]
        return torch.cat((self.keys[:min(sink, self.local_end)], window))


def official_views(plan, write_once):
    """What each evaluation attends to: numbers 1000 * evaluation + frame."""
    cache, views, start, prompt = RollingCache(plan.capacity, plan.sink, plan.window != -1), [], 0, 0

    def forward(begin, count, protect):
        new = 1000.0 * (len(views) + 1) + torch.arange(begin, begin + count)
        views.append(cache.forward(begin, new, protect))

    for index, count in enumerate(plan.blocks):
        if sum(start >= frame for frame in plan.switches) > prompt:
            prompt += 1
            covered = min(plan.capacity, start)
            forward(start - covered, covered, plan.global_sink)
        passes = len(plan.steps) + (index + 1 < len(plan.blocks))
        for _ in range(passes):
            forward(start, count, write_once)
        start += count
    return [sorted(view.tolist()) for view in views]


def ring_views(plan, cache_class):
    layout = CacheLayout(layers=1, width=2, heads=1, capacity=plan.capacity, sink=min(plan.sink, plan.capacity),
                         frame_tokens=TOKENS, relative_sink=False)
    cache, views = cache_class(layout, 1, torch.float32, "cpu"), []

    def evaluate(x, t, keys, frame_ids, cache, sink_mode):
        numbers = 1000.0 * (len(views) + 1) + torch.tensor(list(frame_ids))
        new = numbers.repeat_interleave(TOKENS)[None, :, None].expand(1, -1, 2).float()
        window = cache.open(frame_ids, sink_mode, 1, TOKENS)
        key = store(window.layers[0].keys_BKC, new, window.slots_F)[:, :window.attended]
        views.append(key[0, ::TOKENS, 0].tolist())
        assert torch.equal(key[0, ::TOKENS], key[0, 1::TOKENS])
        return torch.zeros_like(x)

    loop = BlockLoop(plan=plan, evaluate=evaluate, caches=[cache], project=lambda prompt: [()],
                     noise=lambda start, count, step: torch.zeros(1, 1, count, 1, 1), y_BYFHW=None,
                     on_step=lambda *_: None)
    for _ in loop.run(None, None, None):
        pass
    return [sorted(view) for view in views]


@st.composite
def plans(draw):
    blocks = draw(st.lists(st.integers(1, 4), min_size=1, max_size=12))
    sink = draw(st.integers(0, 5))
    window = draw(st.one_of(st.just(-1), st.integers(sink + max(blocks), sink + max(blocks) + 7)))
    sink = 0 if window == -1 else sink
    starts = [sum(blocks[:count]) for count in range(1, len(blocks))]
    switches = draw(st.lists(st.sampled_from(starts), unique=True, max_size=3)) if starts else []
    return make_plan(blocks, window=window, sink=min(sink, sum(blocks)), switches=tuple(sorted(switches)),
                     global_sink=draw(st.booleans()))


@settings(derandomize=True, max_examples=400, deadline=None)
@given(plans(), st.booleans())
def test_the_ring_holds_what_the_rolling_cache_holds(plan, write_once):
    cache_class = official_cache() if write_once else KVCache
    assert ring_views(plan, cache_class) == official_views(plan, write_once)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.data())
def test_every_frame_has_a_slot_of_its_own(data):
    sink, room = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 9))
    capacity = sink + room
    start, count = data.draw(st.integers(0, 60)), data.draw(st.integers(1, room))
    slots = slots_of(start, count, capacity, sink, "write")
    assert slots == [slot_of(frame, capacity, sink) for frame in range(start, start + count)]
    assert len(set(slots)) == count and set(slots) <= set(range(capacity))


def test_more_frames_than_fit_are_refused():
    with pytest.raises(ValueError, match="give at most 4"):
        slots_of(10, 5, capacity=6, sink=2, sink_mode="write")


@pytest.mark.parametrize("capacity, sink", [(7, 3), (5, 1), (6, 2)])
def test_a_relative_sink_scores_as_a_window_turned_from_zero(capacity, sink):
    """Compare with un-rotated keys of the whole window, rotated at 0 .. L - 1 in every pass (LongLive infinity)."""
    block, heads, rows, columns, head_dim = 2, 2, 1, 2, 12
    width = heads * head_dim
    layout = CacheLayout(layers=1, width=width, heads=heads, capacity=capacity, sink=sink, frame_tokens=rows * columns,
                         relative_sink=True)
    cache = KVCache(layout, 2, torch.float32, "cpu")
    generator = torch.Generator().manual_seed(0)
    raw_BFTC = torch.randn(2, 600, rows * columns, width, generator=generator)

    def attention(query, key, value, *_, **__):
        seen_by_attention[:] = key, value
        return query

    seen_by_attention, layer = [], SelfAttention(width, heads, Layers, attention)

    def turn(x_BFTC, positions):
        return rotate(x_BFTC.flatten(1, 2), make_rotation(positions, rows, columns, head_dim), heads)

    def scores(query, key):
        query, key = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
        return query @ key.transpose(-1, -2)

    for start in range(0, 600, block):
        end = start + block
        frames, raw = range(start, end), raw_BFTC[:, start:end]
        window = cache.open(frames, "write", rows, columns)
        layer(raw.flatten(1, 2), Step(None, window), window.layers[0])
        keys, values = seen_by_attention
        seen = [*range(min(sink, end)), *range(max(sink, end - (capacity - sink)), end)]
        order = torch.tensor([slot_of(frame, capacity, sink) for frame in seen])
        keys = keys.unflatten(1, (-1, rows * columns))[:, order].flatten(1, 2)
        values = values.unflatten(1, (-1, rows * columns))[:, order].flatten(1, 2)
        window = raw_BFTC[:, seen]
        expected = scores(turn(raw, range(len(seen) - block, len(seen))), turn(window, range(len(seen))))
        assert torch.allclose(scores(turn(raw, frames), keys), expected, atol=2e-4, rtol=0), start
        assert torch.equal(values, window.flatten(1, 2))


def test_size_is_known_before_anything_is_allocated():
    layout = CacheLayout(layers=30, width=1536, heads=12, capacity=12, sink=3, frame_tokens=1560, relative_sink=False)
    assert layout.nbytes(1, 2) == 12 * 287_539_200  # 0.288 GB per latent frame of the 1.3B model at 832 x 480
    small = CacheLayout(layers=2, width=8, heads=2, capacity=5, sink=2, frame_tokens=3, relative_sink=True)
    cache = KVCache(small, 3, torch.bfloat16, "cpu")
    assert sum(tensor.nbytes for tensor in cache.tensors()) == small.nbytes(3, 2)
