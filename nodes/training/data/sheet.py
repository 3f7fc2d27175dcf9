"""Contact sheets of clips: one row of frames per clip, with its label beside it."""
from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from ...common.drawing import INK, SCALE, Pen, blank, shrink

FRAMES, EDGE, GAP = 6, 96, 4
LABEL, LETTERS, LINES, LINE = 150, 25, 6, 15  # the label's width, its letters a line and lines, and a line's height


def draw_sheet(rows: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """RGB image with a row of frames for every (name, clip [T, H, W, 3] in 0..1)."""
    edge = EDGE
    width, height = LABEL + GAP + FRAMES * (edge + GAP), GAP + len(rows) * (edge + GAP)
    sheet = blank(width, height)
    pen = Pen(sheet)
    for number, (name, clip_THWC) in enumerate(rows):
        top = GAP + number * (edge + GAP)
        for line, text in enumerate(textwrap.wrap(name, LETTERS, max_lines=LINES, placeholder=" ...")):
            pen.text(GAP, top + LINE * line, text, 11, INK)
        for i in range(FRAMES):
            frame_HWC = clip_THWC[round(i * (len(clip_THWC) - 1) / (FRAMES - 1))]
            frame = Image.fromarray((frame_HWC * 255).round().byte().numpy())
            factor = edge * SCALE / max(frame.size)
            frame = frame.resize((round(frame.width * factor), round(frame.height * factor)), Image.Resampling.BICUBIC)
            sheet.paste(frame, ((LABEL + GAP + i * (edge + GAP)) * SCALE, top * SCALE))
    return shrink(sheet)
