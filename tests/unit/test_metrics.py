"""PSNR, SSIM and motion error: known errors give known numbers."""
import sys
from dataclasses import replace

import comfy.model_management
import numpy as np
import pytest
import torch
from stillmotion.nodes.common.drawing import ROW
from stillmotion.nodes.evaluation.metrics import SAME, compare
from stillmotion.nodes.evaluation.plot import draw_scores
from stillmotion.nodes.training.data import shapes as data
from stillmotion.nodes.training.data.clips import MovingShapes

pytest.importorskip("skimage")
CLIP = MovingShapes(1).clip(0)[0]
OTHER_WAY = {"left": "right", "right": "left", "up": "down", "down": "up"}


def drawn(frames=3, **changes):
    return data.draw_clip(replace(CLIP, **changes), frames).float() / 255


def test_a_video_against_itself():
    psnr, ssim, motion = compare(drawn(), drawn()).mean()
    assert (psnr, motion) == (SAME, 0) and ssim == pytest.approx(1)


def test_psnr_and_ssim_of_known_errors():
    truth = torch.full((2, 16, 16, 3), 0.5)
    scores = compare(truth + torch.tensor([0.1, 0.01])[:, None, None, None], truth)
    assert scores.psnr[0] == pytest.approx([20, 40], abs=1e-3)
    bright, dark = 0.6, 0.5  # for two uniform pictures only the first factor of SSIM remains
    assert scores.ssim[0, 0] == pytest.approx((2 * bright * dark + 1e-4) / (bright ** 2 + dark ** 2 + 1e-4), abs=1e-4)


def test_motion_error_is_the_difference_of_the_speeds():
    truth = drawn()
    still = truth[:1].repeat(3, 1, 1, 1)
    noisy = truth + 0.02 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    errors = {name: compare(video, truth).motion.mean() for name, video in (
        ("noisy", noisy), ("half", drawn(fs=2 * CLIP.fs)), ("still", still),
        ("back", drawn(direction=OTHER_WAY[CLIP.direction])))}
    assert errors["noisy"] < 0.12
    assert errors["half"] == pytest.approx(CLIP.speed / 2, rel=0.2)
    assert errors["still"] == pytest.approx(CLIP.speed, rel=0.1)
    assert errors["back"] == pytest.approx(2 * CLIP.speed, rel=0.2)


def test_motion_in_larger_pictures_is_in_their_pixels():
    large = [torch.nn.functional.interpolate(video.movedim(-1, 1), scale_factor=4, mode="bilinear").movedim(1, -1)
             for video in (drawn(2)[:1].repeat(2, 1, 1, 1), drawn(2))]
    assert compare(*large).motion.mean() == pytest.approx(4 * CLIP.speed, rel=0.15)


def test_several_clips_in_a_row_are_measured_apart():
    truth = torch.cat((drawn(2), drawn(2, x=CLIP.x + 9)))
    result = torch.cat((drawn(2)[:1].repeat(2, 1, 1, 1), truth[2:]))
    scores = compare(result, truth, clip_frames=2)
    assert scores.psnr.shape == scores.ssim.shape == (2, 2) and scores.motion.shape == (2, 1)
    assert scores.motion[1] == 0 < scores.motion[0]
    lines = scores.table().splitlines()
    assert [line.split()[0:2] for line in lines[2:6]] == [
        ["clip", "1"], ["clip", "2"], ["frame", "1"], ["frame", "2"]]
    assert float(lines[1].split()[1]) == pytest.approx(scores.psnr.mean(), abs=0.006)


def test_plot_has_a_line_a_measure_and_clip():
    scores = compare(drawn(2).roll(1, 1), drawn(2))
    picture = np.asarray(draw_scores(scores))
    assert picture.shape == (536 + 5 * ROW, 800, 3)  # below: header, mean, two frames, a margin
    for colour in ((45, 110, 210), (38, 145, 86), (236, 140, 40)):
        assert (abs(picture.astype(int) - colour).sum(-1) < 30).sum() > 40
    one = compare(drawn(1), drawn(1))
    assert one.mean()[2] is None and draw_scores(one).height == 376 + 4 * ROW and "motion" in one.table()


@pytest.mark.parametrize("result, truth, clip_frames, words", [
    ((3, 16, 16, 3), (4, 16, 16, 3), 0, "result has 3 frames of 16x16, the truth 4 frames of 16x16"),
    ((3, 16, 24, 3), (3, 16, 16, 3), 0, "24x16"), ((3, 8, 16, 3), (3, 8, 16, 3), 0, "16x8. SSIM needs at least 11"),
    ((3, 16, 16, 3), (3, 16, 16, 3), 2, "clip_frames is 2, but there are 3 frames"),
    ((3, 16, 16, 3), (3, 16, 16, 3), -3, "clip_frames is -3")])
def test_videos_that_do_not_fit_are_refused(result, truth, clip_frames, words):
    with pytest.raises(ValueError, match=words):
        compare(torch.zeros(result), torch.zeros(truth), clip_frames)


def test_nan_and_a_missing_package_are_named(monkeypatch):
    with pytest.raises(ValueError, match="NaN or infinite"):
        compare(torch.full((1, 16, 16, 3), torch.nan), torch.zeros(1, 16, 16, 3))
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(ImportError, match="Evaluate Video needs scikit-image, .* pip install scikit-image"):
        compare(drawn(1), drawn(1))


def test_a_cancel_is_heard_at_every_frame(monkeypatch):
    """At any of the checks for it, of which there are several per frame."""
    looks, stop = [], comfy.model_management.InterruptProcessingException

    def look():
        looks.append(None)
        if len(looks) == last:
            raise stop

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", look)
    last = None
    compare(drawn(), drawn())
    made = len(looks)
    assert made >= 3 * 5
    for last in range(1, made + 1):
        looks.clear()
        with pytest.raises(stop):
            compare(drawn(), drawn())
