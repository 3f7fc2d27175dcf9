"""Contact sheets of clips: one labelled row of frames per clip."""
from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from ...common.drawing import INK, SCALE, Pen, blank, shrink

FRAMES, EDGE, GAP = 6, 96, 4


def draw_sheet(rows: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """RGB image with a row of frames for every (name, clip [T, H, W, 3] in 0..1)."""
    edge = EDGE
    width, height = GAP + FRAMES * (edge + GAP), GAP + len(rows) * (edge + GAP + 16)
    sheet = blank(width, height)
    pen = Pen(sheet)
    for number, (name, clip_THWC) in enumerate(rows):
        top = GAP + number * (edge + GAP + 16)
        pen.text(GAP, top, name, 11, INK)
        for i in range(FRAMES):
            frame_HWC = clip_THWC[round(i * (len(clip_THWC) - 1) / (FRAMES - 1))]
            frame = Image.fromarray((frame_HWC * 255).round().byte().numpy())
            factor = edge * SCALE / max(frame.size)
            frame = frame.resize((round(frame.width * factor), round(frame.height * factor)), Image.Resampling.BICUBIC)
            sheet.paste(frame, ((GAP + i * (edge + GAP)) * SCALE, (top + 14) * SCALE))
    return shrink(sheet)
