"""The per-step report: correct numbers, verdicts at their thresholds, and the plot."""
import re

import numpy as np
import pytest
import torch
from stillmotion.nodes.common.drawing import ALARM, INK, LEVELS, MOST_ROWS, ROW
from stillmotion.nodes.ddim.plot import CLIPPED, HEIGHT, LATENT, LEFT, MIDDLE, RIGHT, TOP, WIDTH, X0, draw_report
from stillmotion.nodes.ddim.report import COLUMNS, Recorder, SamplingReport

SHAPE = (1, 4, 2, 8, 8)


def report(steps=5, x0_scale=1.0, x_scale=1.0, mode="off", original=False, spoil=None, image_reach=0.0):
    generator = torch.Generator().manual_seed(0)
    recorder = Recorder("settings in a line", mode, 3.0, original)
    for step in range(steps):
        x0, x = (scale * torch.randn(SHAPE, generator=generator).clamp(-2.4, 2.4) for scale in (x0_scale, x_scale))
        if spoil and step >= 2:
            x.view(-1)[:3], x0.view(-1)[1:5] = float(spoil[0]), float(spoil[1])
        recorder.record(999 - step, x0, x)
    return recorder.finish(image_reach)


def test_the_numbers():
    x0 = torch.tensor([-4.0, -1.0, 0.0, 5.0]).view(1, 1, 2, 2)
    x = torch.tensor([-2.0, float("nan"), 1.0, float("inf")]).view(1, 1, 2, 2)
    recorder = Recorder("s", "static", 3.0, False)
    recorder.record(999, x0, x)
    found = recorder.finish(0.0)
    row = {name: found.columns[name][0] for name in COLUMNS}
    assert (row["x0_min"], row["x0_max"], row["x0_mean"], row["beyond"]) == (-4, 5, 0, 2)
    assert row["x0_std"] == pytest.approx(x0.std().item())
    assert (row["x_min"], row["x_max"], row["nan"], row["inf"]) == (-2, 1, 1, 1)
    assert found.values == 4 and found.timesteps == [999]


@pytest.mark.parametrize("changes, level, words", [
    ({}, "good", "no NaN or Inf"),
    ({"x_scale": 3.0}, "doubtful", "raise guidance_rescale"),
    ({"x_scale": 3.0, "image_reach": 6.0}, "good", r"is within \+-7\.2, 0\.0% of the last predicted"),
    ({"x_scale": 9.0, "image_reach": 6.0}, "doubtful", "about 6.0 is usual"),
    ({"x_scale": 50.0}, "bad", "colour noise"),
    ({"x0_scale": 1.45}, "doubtful", "are beyond"),
    ({"x0_scale": 4.0}, "bad", "clip x0"),
    ({"x0_scale": 1.45, "mode": "static"}, "doubtful", "raise guidance_rescale.$"),
    ({"x_scale": 0.02}, "doubtful", "nearly flat"),
    ({"spoil": ("nan", "nan")}, "bad", "starting at step 3 .timestep 997.. The model itself"),
    ({"spoil": ("inf", "0")}, "bad", "3 of 512 values are NaN or Inf"),
    ({"spoil": ("nan", "nan"), "original": True}, "bad", "choose the fixed tables"),
])
def test_verdicts(changes, level, words):
    found = report(**changes)
    assert found.verdict()[0] == level
    assert re.search(words, found.verdict()[1])
    lines = found.text().splitlines()
    assert lines[0].startswith(level) and lines[1] == "settings in a line" and len(lines) == 3 + 5


LATENT_SHADE = tuple(255 + (c - 255) * 46 // 255 for c in LATENT)


def near(picture, colour):
    return (np.abs(picture.astype(int) - colour).max(-1) < 12).sum()


def test_the_plot_shows_verdict_clipped_values_and_nan():
    pictures = {}
    for name, changes in {"good": {}, "bad": {"x0_scale": 4.0}, "nan": {"spoil": ("nan", "nan")}}.items():
        image = draw_report(report(**changes))
        assert image.size == (WIDTH, HEIGHT + 7 * ROW) and image.mode == "RGB"  # header, five steps and a margin
        pictures[name] = np.asarray(image)
    table = pictures["good"][HEIGHT:]
    assert all(near(table[ROW * i:ROW * (i + 1)], INK) > 100 for i in range(1, 6))  # a line of text for each step
    assert near(pictures["nan"][HEIGHT:], ALARM) > 100  # the steps with NaN are red
    assert near(pictures["good"], LEVELS["good"]) > 1000 > near(pictures["good"], ALARM)
    assert near(pictures["bad"], ALARM) > 1000
    shade = tuple(255 + (c - 255) * 200 // 255 for c in CLIPPED)
    assert near(pictures["bad"], shade) > 5000 > near(pictures["good"], shade)
    pink = tuple(255 + (c - 255) * 70 // 255 for c in ALARM)
    assert near(pictures["nan"], pink) > 50000 > near(pictures["bad"], pink)


@pytest.mark.parametrize("steps", [1, 2, 61, 1000])
def test_the_plot_draws_any_number_of_steps(steps):
    picture = np.asarray(draw_report(report(steps)))
    assert len(picture) == HEIGHT + ROW * (min(steps, MOST_ROWS) + 2)
    upper_panel = picture[TOP:MIDDLE]
    drawn = (np.abs(upper_panel.astype(int) - X0).max(-1) < 40).any(0).nonzero()[0]  # columns with the means' line
    end = 0 if steps == 1 else (RIGHT - LEFT) / steps / 2  # it runs from the first step to the last
    assert abs(drawn.min() - LEFT - end) < 4 and abs(drawn.max() - RIGHT + end) < 4
    assert steps == 2 or len(drawn) > 0.9 * (drawn.max() - drawn.min())


def test_a_huge_range_still_has_round_ticks():
    columns = {name: [0.0, 0.0] for name in COLUMNS} | {"x_min": [-1e30, -1e30], "x_max": [2e30, 2e30]}
    found = SamplingReport("s", "off", 3.0, 512, False, [999, 499], columns)
    assert found.verdict()[0] == "bad"
    picture = np.asarray(draw_report(found))
    assert near(picture, LEVELS["bad"]) > 1000 and near(picture[TOP:MIDDLE], LATENT_SHADE) > 5000
