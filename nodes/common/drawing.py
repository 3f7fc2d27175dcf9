"""Drawing with Pillow, shared by plots and sheets. ComfyUI ships Pillow but no plotting library."""
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

SCALE = 2  # drawn at SCALE times the size, then downscaled for smooth lines
INK, SOFT, GRID, PAPER = (38, 43, 51), (116, 124, 136), (228, 231, 236), (255, 255, 255)
BLUE, ORANGE, GREEN, ALARM = (45, 110, 210), (236, 140, 40), (38, 145, 86), (214, 48, 60)
LEVELS = {"good": GREEN, "doubtful": (205, 135, 20), "bad": ALARM}


def blank(width: int, height: int) -> Image.Image:
    """A blank picture for a Pen, at SCALE times the size."""
    return Image.new("RGB", (width * SCALE, height * SCALE), PAPER)


def shrink(image: Image.Image) -> Image.Image:
    """The finished picture downscaled to its final size."""
    return image.resize((image.width // SCALE, image.height // SCALE), Image.Resampling.LANCZOS)


def as_images(picture: Image.Image) -> torch.Tensor:
    """A picture as a ComfyUI IMAGE [1, H, W, 3]."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]


class Pen:
    """Draws on an image at SCALE times the given coordinates."""

    def __init__(self, image):
        self.draw = ImageDraw.Draw(image, "RGBA")

    def text(self, x, y, text, size, colour=INK, anchor="lt"):
        self.draw.text((x * SCALE, y * SCALE), text, colour, ImageFont.load_default(size * SCALE), anchor)

    def box(self, x0, y0, x1, y1, colour, alpha=255, radius=0):
        corners = (x0 * SCALE, min(y0, y1) * SCALE, x1 * SCALE, max(y0, y1) * SCALE)
        self.draw.rounded_rectangle(corners, radius * SCALE, (*colour, alpha))

    def path(self, points, colour, width=1.0):
        self.draw.line([(x * SCALE, y * SCALE) for x, y in points], colour, round(width * SCALE), joint="curve")

    def fill(self, points, colour, alpha):
        self.draw.polygon([(x * SCALE, y * SCALE) for x, y in points], (*colour, alpha))

    def dashes(self, x0, x1, y, colour):
        for x in range(x0, x1, 10):
            self.path([(x, y), (min(x + 5, x1), y)], colour, 1.2)
