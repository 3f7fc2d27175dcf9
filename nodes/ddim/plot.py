"""Draws a SamplingReport with Pillow: ranges of predicted x0 and latent over the steps, clipped values, the table."""
import math
import textwrap

from PIL import Image

from ..common.drawing import (
    ALARM,
    BLUE,
    GRID,
    INK,
    LEVELS,
    ORANGE,
    PAPER,
    SOFT,
    Pen,
    blank,
    draw_table,
    shrink,
    stacked,
)
from .report import SamplingReport

WIDTH, HEIGHT = 800, 530  # of the curves; the table is below
LEFT, RIGHT, TOP, MIDDLE, GAP, BOTTOM = 64, 780, 150, 360, 30, 470
CHARACTERS = 82  # of a line at this width
X0, LATENT, CLIPPED = BLUE, ORANGE, (128, 90, 190)


def draw_report(report: SamplingReport) -> Image.Image:
    """RGB picture, WIDTH pixels wide: the curves, and the table of the steps below."""
    image = blank(WIDTH, HEIGHT)
    pen = Pen(image)
    columns, steps = report.columns, len(report.timesteps)
    _headline(pen, report)
    low = min(*columns["x0_min"], *columns["x_min"], -report.limit)
    high = max(*columns["x0_max"], *columns["x_max"], report.limit)
    upper = _Axes(pen, steps, _ticks(low, high, 6), TOP, MIDDLE)
    lower = _Axes(pen, steps, _ticks(0, max(1.0, *columns["beyond"]), 3), MIDDLE + GAP, BOTTOM)
    for i in range(steps):
        if columns["nan"][i] or columns["inf"][i]:
            for axes in (upper, lower):
                pen.box(axes.x(i - 0.5), axes.top, axes.x(i + 0.5), axes.bottom, ALARM, 70)
    upper.band(columns["x_min"], columns["x_max"], LATENT)
    upper.band(columns["x0_min"], columns["x0_max"], X0)
    upper.line(columns["x0_mean"], X0)
    for limit in (-report.limit, report.limit):
        pen.dashes(LEFT, RIGHT, upper.y(limit), CLIPPED)
    for i, count in enumerate(columns["beyond"]):
        pen.box(lower.x(i - 0.35), lower.y(count), lower.x(i + 0.35), lower.y(0), CLIPPED, 200)
    _step_labels(pen, lower, report.timesteps)
    counted = "values beyond the dashed lines" if report.clip_mode == "off" else "values clipped"
    pen.text(LEFT, MIDDLE + GAP / 2, counted, 13, CLIPPED, "lm")
    _legend(pen, report)
    broken = {i for i in range(steps) if columns["nan"][i] or columns["inf"][i]}
    return stacked(shrink(image), draw_table(*report.table(), WIDTH, broken))


class _Axes:
    """A panel from `top` to `bottom`: step i is in the middle of its own slot, values between the outer ticks."""

    def __init__(self, pen, steps, ticks, top, bottom):
        self.pen, self.steps, self.top, self.bottom = pen, steps, top, bottom
        self.low, self.high = ticks[0], ticks[-1]
        for tick in ticks:
            pen.path([(LEFT, self.y(tick)), (RIGHT, self.y(tick))], GRID if tick else SOFT)
            pen.text(LEFT - 8, self.y(tick), f"{tick:g}", 13, SOFT, "rm")

    def x(self, step):
        return LEFT + (step + 0.5) * (RIGHT - LEFT) / self.steps

    def y(self, value):
        return self.bottom - (value - self.low) / (self.high - self.low) * (self.bottom - self.top)

    def points(self, values):
        if len(values) == 1:  # a single step must be visible too
            return [(LEFT, self.y(values[0])), (RIGHT, self.y(values[0]))]
        return [(self.x(i), self.y(value)) for i, value in enumerate(values)]

    def line(self, values, colour):
        self.pen.path(self.points(values), colour, 2)

    def band(self, low, high, colour):
        upper, lower = self.points(high), self.points(low)
        self.pen.fill(upper + lower[::-1], colour, 46)
        self.pen.path(upper, colour, 1.4)
        self.pen.path(lower, colour, 1.4)


def _ticks(low, high, wanted):
    """Round numbers that enclose low..high, about `wanted` intervals."""
    rough = (high - low) / wanted
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _headline(pen, report):
    level, reason = report.verdict()
    pen.box(LEFT, 18, LEFT + 96, 46, LEVELS[level], radius=6)
    pen.text(LEFT + 48, 32, level, 17, PAPER, "mm")
    for line, text in enumerate(textwrap.wrap(f"Sampling: {reason}", CHARACTERS)):
        pen.text(LEFT + 110, 22 + 19 * line, text, 15, INK, "lm")
    for line, text in enumerate(textwrap.wrap(report.settings, CHARACTERS + 20)):
        pen.text(LEFT, 86 + 17 * line, text, 13, SOFT, "lm")


def _step_labels(pen, axes, timesteps):
    every = max(1, math.ceil(len(timesteps) / 10))
    for i in range(0, len(timesteps), every):
        pen.text(axes.x(i), axes.bottom + 8, str(i + 1), 13, INK, "mt")
        pen.text(axes.x(i), axes.bottom + 24, f"t {timesteps[i]}", 11, SOFT, "mt")
    pen.text((LEFT + RIGHT) / 2, HEIGHT - 16, "step (t: timestep)", 13, SOFT, "mm")


def _legend(pen, report):
    x, y = LEFT, 128
    for colour, label in ((X0, "predicted x0: range and mean"), (LATENT, "latent: range")):
        pen.box(x, y - 6, x + 22, y + 6, colour, 90)
        pen.path([(x, y), (x + 22, y)], colour, 2)
        pen.text(x + 30, y, label, 13, INK, "lm")
        x += 245 if colour == X0 else 150
    pen.dashes(x, x + 24, y, CLIPPED)
    meaning = "no clipping" if report.clip_mode == "off" else f"{report.clip_mode} clip"
    pen.text(x + 32, y, f"+-{report.limit:g} ({meaning})", 13, INK, "lm")
    if any(report.columns["nan"]) or any(report.columns["inf"]):
        pen.box(x + 180, y - 6, x + 202, y + 6, ALARM, 70)
        pen.text(x + 210, y, "NaN or Inf", 13, INK, "lm")
