"""The tracker on real, static, shuffled and reversed clips."""
import importlib.util
import io
from pathlib import Path
from random import Random

import av
import numpy as np
import pytest
import torch
from stillmotion.nodes.common.video import encode_mp4
from stillmotion.nodes.training.data import shapes as data

spec = importlib.util.spec_from_file_location("tracking", Path(__file__).parents[1] / "tracking.py")
tracking = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tracking)

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def look(frames):
    return tracking.track(frames, data.COLOURS, data.BACKGROUNDS, data.DIRECTIONS)


@pytest.fixture(scope="module")
def clips():
    rng = Random(11)
    descriptions = [data.random_clip(rng, held_out=None) for _ in range(200)]
    return [(d, data.draw_clip(d).numpy()) for d in descriptions]


@pytest.mark.parametrize("look_of", ["as drawn", "blurred and noisy", "through an MP4"])
def test_all_true_clips_are_found(clips, look_of):
    rng = np.random.default_rng(5)
    for d, frames in clips:
        if look_of == "blurred and noisy":
            soft = torch.nn.functional.avg_pool2d(torch.from_numpy(frames).permute(0, 3, 1, 2).float(), 3, 1, 1,
                                                  count_include_pad=False).permute(0, 2, 3, 1).numpy()
            frames = (soft + rng.normal(0, 8, soft.shape)).clip(0, 255).astype(np.uint8)
        if look_of == "through an MP4":
            frames = decoded(frames)
        found = look(frames)
        assert (found.colour, found.background, found.direction) == (d.colour, d.background, d.direction)
        step = np.array(data.DIRECTIONS[d.direction]) * d.speed
        true_path = np.array([d.x, d.y]) + step * np.arange(16)[:, None]
        assert np.abs(found.path_T2 - true_path).max() < (1.0 if look_of == "blurred and noisy" else 0.7)


def decoded(frames):
    with av.open(io.BytesIO(encode_mp4(frames, 8, crf=10))) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_no_static_clip_moves(clips):
    assert not [d for d, frames in clips if look(np.repeat(frames[:1], 16, 0)).direction]


def test_no_shuffled_clip_moves(clips):
    rng = np.random.default_rng(7)
    assert not [d for d, frames in clips if look(frames[rng.permutation(16)]).direction]


def test_reversed_clips_move_the_other_way(clips):
    assert all(look(frames[::-1]).direction == OPPOSITE[d.direction] for d, frames in clips)


def test_floats_and_bytes_are_seen_alike(clips):
    _, frames = clips[0]
    a, b = look(frames), look(frames.astype(np.float32) / 255)
    assert (a.colour, a.background, a.direction) == (b.colour, b.background, b.direction)


def test_a_clip_without_a_shape_has_no_track():
    found = look(np.full((16, 64, 64, 3), 16, np.uint8))
    assert (found.background, found.colour, found.direction) == ("black", None, None)


def test_changing_colours_are_not_kept(clips):
    d, frames = next((d, f) for d, f in clips if d.background == "black" and d.colour == "red")
    frames = frames.copy()
    frames[8:] = frames[8:, ..., ::-1]  # red turns blue halfway
    found = look(frames)
    assert found.colour is None and found.direction == d.direction
