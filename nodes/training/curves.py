"""Loss, validation loss and PSNR over the training steps, drawn with Pillow."""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..common.drawing import BLUE, GREEN, GRID, INK, ORANGE, SOFT, Pen, blank, shrink
from .logs import read_lines

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 588, 56, 258
LOSS, VALIDATION, PSNR = BLUE, ORANGE, GREEN

Points = Sequence[tuple[int, float]]


class Curves(NamedTuple):
    """(step, value) pairs of every curve."""

    loss: Points
    validation: Points
    psnr: Points     # dB


def read_curves(folder: Path) -> Curves:
    """What a run has logged so far, with its stages concatenated."""
    def points(name: str) -> Points:
        return [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]

    rows = [row for row in read_lines(folder / "metrics.jsonl") if "step" in row]
    return Curves(points("loss"), points("validation"), points("psnr"))


def draw_curves(curves: Curves, headline: str) -> Image.Image:
    """RGB image of WIDTH x HEIGHT pixels: losses on a log scale on the left, PSNR on the right."""
    image = blank(WIDTH, HEIGHT)
    pen = Pen(image)
    pen.text(LEFT, 12, headline, 13, INK)
    steps = [step for points in curves for step, _ in points] or [1]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    losses = [math.log10(max(value, 1e-9)) for _, value in (*curves.loss, *curves.validation)] or [-1.0, 0.0]
    low, high = math.floor(min(losses) * 4) / 4, math.ceil(max(losses) * 4 + 0.01) / 4

    def x(step: int) -> float:
        return LEFT + (step - first) / (last - first) * (RIGHT - LEFT)

    def loss_y(value: float) -> float:
        return BOTTOM - (math.log10(max(value, 1e-9)) - low) / (high - low) * (BOTTOM - TOP)

    for i in range(5):
        level = 10 ** (low + (high - low) * i / 4)
        pen.path([(LEFT, loss_y(level)), (RIGHT, loss_y(level))], GRID)
        pen.text(LEFT - 6, loss_y(level), f"{level:.2g}", 11, SOFT, "rm")
        step = round(first + (last - first) * i / 4)
        pen.text(x(step), BOTTOM + 6, str(step), 11, SOFT, "mt")
    for points, colour in ((curves.loss, LOSS), (curves.validation, VALIDATION)):
        if points:
            _line(pen, [(x(step), loss_y(value)) for step, value in points], colour)
    if curves.psnr:
        values = [value for _, value in curves.psnr]
        bottom, top = math.floor(min(values)) - 1, math.ceil(max(values)) + 1
        _line(pen, [(x(step), BOTTOM - (value - bottom) / (top - bottom) * (BOTTOM - TOP))
                    for step, value in curves.psnr], PSNR)
        for value, place in ((bottom, BOTTOM), (top, TOP)):
            pen.text(RIGHT + 6, place, f"{value} dB", 11, PSNR, "lm")
    pen.text((LEFT + RIGHT) / 2, HEIGHT - 6, "step", 11, SOFT, "mb")
    pen.text(8, TOP - 14, "loss (log scale)", 11, SOFT, "lm")
    if curves.psnr:
        pen.text(WIDTH - 8, TOP - 28, "PSNR (dB)", 11, PSNR, "rm")
    for i, (name, colour, points) in enumerate((("loss", LOSS, curves.loss), ("PSNR", PSNR, curves.psnr),
                                                ("validation loss", VALIDATION, curves.validation))):
        if points:
            pen.text(RIGHT - 60 * i, TOP - 14, name, 12, colour, "rm")
    return shrink(image)


def _line(pen: Pen, points: list[tuple[float, float]], colour: tuple[int, int, int]) -> None:
    if len(points) == 1:  # a single point must still be visible
        points = [(points[0][0] - 3, points[0][1]), (points[0][0] + 3, points[0][1])]
    pen.path(points, colour, 1.6)
