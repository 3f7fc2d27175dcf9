"""Loss, validation loss and PSNR over the training steps, drawn with Pillow."""
from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..common.drawing import BLUE, GREEN, GRID, INK, LETTER, ORANGE, SOFT, Pen, blank, shrink
from .data.sheet import GAP, LETTERS, LINE, WIDTH
from .logs import read_lines

HEIGHT = 294
LEFT, RIGHT, TOP, BOTTOM = 86, WIDTH - 70, 92, 234
TITLES, TICKS = 58, 4  # where the axes' titles begin; ticks of an axis
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
    for number, words in enumerate(textwrap.wrap(headline, LETTERS, max_lines=2, placeholder=" ...")):
        pen.text(GAP, 4 + LINE * number, words, LETTER, INK)
    steps = [step for points in curves for step, _ in points] or [1]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    losses = [math.log10(max(value, 1e-9)) for _, value in (*curves.loss, *curves.validation)] or [-1.0, 0.0]
    low, high = math.floor(min(losses) * 4) / 4, math.ceil(max(losses) * 4 + 0.01) / 4

    def x(step: int) -> float:
        return LEFT + (step - first) / (last - first) * (RIGHT - LEFT)

    def loss_y(value: float) -> float:
        return BOTTOM - (math.log10(max(value, 1e-9)) - low) / (high - low) * (BOTTOM - TOP)

    for i in range(TICKS):
        level = 10 ** (low + (high - low) * i / (TICKS - 1))
        pen.path([(LEFT, loss_y(level)), (RIGHT, loss_y(level))], GRID)
        pen.text(LEFT - 6, loss_y(level), f"{level:.2g}", LETTER, SOFT, "rm")
        step = round(first + (last - first) * i / (TICKS - 1))
        pen.text(x(step), BOTTOM + 12, str(step), LETTER, SOFT, "mt")
    pen.text((x(first) + x(last)) / 2, HEIGHT - 4, "step", LETTER, SOFT, "mb")
    left = GAP
    for name, points, colour in (("loss", curves.loss, LOSS), ("validation loss", curves.validation, VALIDATION)):
        if points:
            _line(pen, [(x(step), loss_y(value)) for step, value in points], colour)
            pen.text(left, TITLES, name, LETTER, colour)
            left += pen.width(name + "  ", LETTER)
    pen.text(left, TITLES, "(log scale)", LETTER, SOFT)
    if curves.psnr:
        values = [value for _, value in curves.psnr]
        bottom, top = math.floor(min(values)) - 1, math.ceil(max(values)) + 1
        _line(pen, [(x(step), BOTTOM - (value - bottom) / (top - bottom) * (BOTTOM - TOP))
                    for step, value in curves.psnr], PSNR)
        for value, place in ((bottom, BOTTOM), (top, TOP)):
            pen.text(RIGHT + 6, place, f"{value}", LETTER, PSNR, "lm")
        pen.text(WIDTH - GAP, TITLES, "PSNR (dB)", LETTER, PSNR, "rt")
    return shrink(image)


def _line(pen: Pen, points: list[tuple[float, float]], colour: tuple[int, int, int]) -> None:
    if len(points) == 1:  # a single point must still be visible
        points = [(points[0][0] - 3, points[0][1]), (points[0][0] + 3, points[0][1])]
    pen.path(points, colour, 2.5)
