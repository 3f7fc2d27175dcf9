"""Draws Scores with Pillow."""
from PIL import Image

from ..common.drawing import BLUE, GREEN, GRID, INK, ORANGE, SOFT, Pen, blank, draw_table, shrink, stacked
from .metrics import HEADER, Scores

WIDTH, LEFT, RIGHT, TOP, PANEL, GAP = 800, 70, 775, 56, 120, 40
PANELS = (("PSNR, dB", BLUE), ("SSIM", GREEN), ("motion error, pixels per frame", ORANGE))


def draw_scores(scores: Scores) -> Image.Image:
    """RGB picture, WIDTH pixels wide: one panel per measure, then the table.

    Thin lines are clips, thick ones the mean.
    """
    measures = [m for m in (scores.psnr, scores.ssim, scores.motion) if m.size]
    height = TOP + len(measures) * (PANEL + GAP)
    image = blank(WIDTH, height)
    pen, frames = Pen(image), scores.psnr.shape[1]
    psnr, ssim, motion = scores.mean()
    moves = "" if motion is None else f", motion error {motion:.3f} pixels per frame"
    pen.text(LEFT, 22, f"Mean of {scores.psnr.size} frames: PSNR {psnr:.2f} dB, SSIM {ssim:.4f}{moves}", 15, INK, "lm")
    for number, (values_CT, (name, colour)) in enumerate(zip(measures, PANELS)):
        top = TOP + number * (PANEL + GAP)
        bottom = top + PANEL
        low = min(0.0, values_CT.min()) if number == 2 else values_CT.min()
        span = max(values_CT.max() - low, 1e-3)
        first = frames - values_CT.shape[1]  # motion starts at the second frame

        def place(frame: int, value: float) -> tuple[float, float]:
            return LEFT + (frame + 0.5) * (RIGHT - LEFT) / frames, bottom - (value - low) / span * PANEL

        pen.text(LEFT, top - 14, name, 13, colour, "lm")
        for level in (low, low + span / 2, low + span):
            y = place(0, level)[1]
            pen.path([(LEFT, y), (RIGHT, y)], GRID)
            pen.text(LEFT - 8, y, f"{level:.4g}", 12, SOFT, "rm")
        for values_T in [*(values_CT if len(values_CT) > 1 else ()), values_CT.mean(0)]:
            points = [place(first + i, value) for i, value in enumerate(values_T)]
            if len(points) == 1:  # a single point must be visible too
                points = [(points[0][0] - 8, points[0][1]), (points[0][0] + 8, points[0][1])]
            pen.path(points, colour, 0.6)
        pen.path(points, colour, 2.2)
    for frame in range(0, frames, max(1, frames // 16)):
        pen.text(LEFT + (frame + 0.5) * (RIGHT - LEFT) / frames, height - GAP + 6, str(frame + 1), 12, SOFT, "mt")
    pen.text((LEFT + RIGHT) / 2, height - 10, "frame", 12, SOFT, "mm")
    return stacked(shrink(image), draw_table(HEADER, scores.rows(), WIDTH))
