"""Measurement of outlines, hues and camera moves, on drawn clips and on clips with known errors."""
from dataclasses import replace
from random import Random

import numpy as np
import outlines
import pytest
import quality_dynamicrafter
from quality_common import judge, load_data
from scipy import ndimage
from stillmotion.nodes.training.data import scenes


def drawn(scene):
    ground = scenes.draw_ground(scene).clamp(0, 255).round().numpy().astype(np.uint8)
    return scenes.draw(scene).numpy(), ground


@pytest.fixture(scope="module")
def clips():
    rng = Random(11)
    found = [scenes.random_object(rng, held_out=None) for _ in range(12)]
    return [(scene, *drawn(scene)) for scene in found]


def test_true_clips_keep_outline_hue_and_path_under_noise(clips):
    rng = np.random.default_rng(5)
    for scene, frames, ground in clips:
        noisy = (frames + rng.normal(0, 8, frames.shape)).clip(0, 255).astype(np.uint8)
        found = outlines.follow(noisy, frames, ground)
        assert found.iou_T.min() > 0.93 and np.nanmax(found.hue_error_T) < 3
        step = np.array(scenes.DIRECTIONS[scene.direction]) * scene.speed * 15
        assert found.path_T2[-1] - found.path_T2[0] == pytest.approx(step, abs=0.8)


def test_another_shape_loses_its_outline_and_its_place_does_not_matter(clips):
    for scene, frames, ground in clips[:6]:
        other = "circle" if scene.shape in ("triangle", "star") else "triangle"
        changed = outlines.follow(scenes.draw(replace(scene, shape=other)).numpy(), frames, ground)
        assert changed.iou_T.mean() < 0.8
        moved = outlines.follow(scenes.draw(replace(scene, x=scene.x + 3)).numpy(), frames, ground)
        assert moved.iou_T.min() > 0.95


def test_a_blurred_outline_is_seen(clips):
    star = next(clip for clip in clips if clip[0].shape == "star")
    blurred = ndimage.gaussian_filter(star[1], (0, 4, 4, 0))
    assert outlines.follow(blurred, star[1], star[2]).iou_T.mean() < 0.85


def test_another_colour_is_seen_and_nothing_is_nothing(clips):
    scene, frames, ground = clips[0]
    other = scenes.draw(replace(scene, colour="cyan" if scene.colour != "cyan" else "red")).numpy()
    assert not np.nanmax(outlines.follow(other, frames, ground).hue_error_T) < 20
    empty = outlines.follow(np.broadcast_to(ground, frames.shape), frames, ground)
    assert empty.iou_T.max() == 0 and np.isnan(empty.hue_error_T).all()


@pytest.mark.parametrize("move", list(scenes.MOVES))
def test_the_camera_is_measured(move):
    scene = replace(scenes.random_camera(Random(6)), move=move)
    x, y, grows = scenes.MOVES[move]
    way = 15 / scene.fs
    flow = outlines.camera_flow(scenes.draw(scene).numpy())
    assert flow[:2] == pytest.approx((-x * scenes.MOTION * way, -y * scenes.MOTION * way), abs=0.5)
    assert flow[2] == pytest.approx(grows * scenes.ZOOM * way, abs=0.01)


def test_a_still_camera_does_not_move():
    still = np.repeat(scenes.draw(scenes.random_camera(Random(7)), 1).numpy(), 3, axis=0)
    assert outlines.camera_flow(still) == pytest.approx(np.zeros(3), abs=1e-3)


def test_the_truth_passes_every_bar_of_the_quality_measure_and_a_still_does_not():
    graphs = {name: {} for name in quality_dynamicrafter.GRAPHS}
    cases = quality_dynamicrafter.make_cases(scenes, graphs, seed=0, pairs=24)
    assert {case["scene"].move for case in cases if hasattr(case["scene"], "move")} == set(scenes.MOVES)
    rows = []
    for case in cases:
        frames = quality_dynamicrafter.truth(case, scenes)
        if case["graph"] == "loop":
            frames = scenes.draw(replace(case["scene"], returns=True)).numpy()
        rows.append(quality_dynamicrafter.measure(case, frames, quality_dynamicrafter.truth(case, scenes), scenes))
    figures = judge(quality_dynamicrafter.summary(rows), quality_dynamicrafter.BARS)
    assert figures["passed"], figures
    still = [quality_dynamicrafter.measure(case, np.repeat(frames[:1], 16, axis=0), frames, scenes)
             for case in cases[:7] for frames in [quality_dynamicrafter.truth(case, scenes)]]
    assert not any(row["direction_right"] for row in still)


def test_the_measures_find_the_drawing_code():
    assert load_data().HELD_OUT_FORM == 3 and load_data("scenes").SIZE == scenes.SIZE
