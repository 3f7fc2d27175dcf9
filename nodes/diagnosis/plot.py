"""Draws a Diagnosis with Pillow: one line per finding, the sampling report below."""
import textwrap

from PIL import Image

from ..common.drawing import INK, LEVELS, PAPER, Pen, blank, shrink, stacked
from ..ddim.plot import CHARACTERS, LEFT, WIDTH, draw_report
from .judgement import Diagnosis

LINE, TOP = 20, 60


def draw_diagnosis(diagnosis: Diagnosis) -> Image.Image:
    """RGB picture, WIDTH pixels wide and as high as the findings require."""
    findings = [f for f in diagnosis.findings if f.topic != "sampling"]  # that one is above the curves
    texts = [textwrap.wrap(f"{f.topic}: {f.text}", CHARACTERS) for f in findings]
    image = blank(WIDTH, TOP + LINE * sum(len(lines) + 1 for lines in texts))
    pen = Pen(image)
    _badge(pen, diagnosis.level, 32, 17)
    pen.text(LEFT + 110, 32, diagnosis.headline(), 16, INK, "lm")
    y = TOP + LINE / 2
    for finding, lines in zip(findings, texts):
        _badge(pen, finding.level, y, 13)
        for line in lines:
            pen.text(LEFT + 110, y, line, 15, INK, "lm")
            y += LINE
        y += LINE
    return stacked(shrink(image), *([draw_report(diagnosis.report)] if diagnosis.report else []))


def _badge(pen, level, y, size):
    pen.box(LEFT, y - size * 0.75, LEFT + 96, y + size * 0.75, LEVELS[level], radius=5)
    pen.text(LEFT + 48, y, level, size, PAPER, "mm")
