"""Contact sheets of clips: one row of frames per clip, with its label above it."""
from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from ...common.drawing import INK, LETTER, SCALE, Pen, blank, shrink

FRAMES, EDGE, GAP = 6, 96, 4
WIDTH = GAP + FRAMES * (EDGE + GAP)
LETTERS, LINES, LINE = 54, 2, LETTER + 4  # of a label: letters a line, lines, and a line's height


def draw_sheet(rows: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """RGB image, WIDTH pixels wide, with a label and a row of frames for every (label, clip [T, H, W, 3] in 0..1)."""
    labels = [textwrap.wrap(label, LETTERS, max_lines=LINES, placeholder=" ...") for label, _ in rows]
    heights = [round(EDGE * SCALE * min(1, clip_THWC.shape[1] / clip_THWC.shape[2])) / SCALE for _, clip_THWC in rows]
    sheet = blank(WIDTH, round(GAP + sum(len(lines) * LINE + height + GAP for lines, height in zip(labels, heights))))
    pen, top = Pen(sheet), GAP
    for lines, height, (_, clip_THWC) in zip(labels, heights, rows):
        for text in lines:
            pen.text(GAP, top, text, LETTER, INK)
            top += LINE
        for i in range(FRAMES):
            frame_HWC = clip_THWC[round(i * (len(clip_THWC) - 1) / (FRAMES - 1))]
            frame = Image.fromarray((frame_HWC * 255).round().byte().numpy())
            factor = EDGE * SCALE / max(frame.size)
            frame = frame.resize((round(frame.width * factor), round(frame.height * factor)), Image.Resampling.BICUBIC)
            sheet.paste(frame, ((GAP + i * (EDGE + GAP)) * SCALE, round(top * SCALE)))
        top += height + GAP
    return shrink(sheet)
