"""Draws a Diagnosis with Pillow: one line per finding, the sampling report below."""
import textwrap

from PIL import Image

from ..common.drawing import INK, LEVELS, PAPER, Pen, blank, shrink
from ..ddim.plot import HEIGHT, LEFT, WIDTH, draw_report
from .judgement import Diagnosis

LINE, TOP, CHARACTERS = 19, 60, 112


def draw_diagnosis(diagnosis: Diagnosis) -> Image.Image:
    """RGB picture, WIDTH pixels wide and as high as the findings require."""
    texts = [textwrap.wrap(f"{f.topic}: {f.text}", CHARACTERS) for f in diagnosis.findings]
    height = TOP + LINE * sum(len(lines) + 1 for lines in texts)
    image = blank(WIDTH, height)
    pen = Pen(image)
    _badge(pen, diagnosis.level, 32, 17)
    pen.text(LEFT + 110, 32, "Diagnosis", 17, INK, "lm")
    y = TOP + LINE / 2
    for finding, lines in zip(diagnosis.findings, texts):
        _badge(pen, finding.level, y, 13)
        for line in lines:
            pen.text(LEFT + 110, y, line, 13, INK, "lm")
            y += LINE
        y += LINE
    image = shrink(image)
    if diagnosis.report is None:
        return image
    both = Image.new("RGB", (WIDTH, height + HEIGHT), PAPER)
    both.paste(image, (0, 0))
    both.paste(draw_report(diagnosis.report), (0, height))
    return both


def _badge(pen, level, y, size):
    pen.box(LEFT, y - size * 0.75, LEFT + 96, y + size * 0.75, LEVELS[level], radius=5)
    pen.text(LEFT + 48, y, level, size, PAPER, "mm")
