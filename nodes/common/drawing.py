"""Drawing with Pillow, shared by plots and sheets. ComfyUI ships Pillow but no plotting library."""
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

SCALE = 2  # drawn at SCALE times the size, then downscaled for smooth lines
INK, SOFT, GRID, PAPER = (38, 43, 51), (116, 124, 136), (228, 231, 236), (255, 255, 255)
BLUE, ORANGE, GREEN, ALARM = (45, 110, 210), (236, 140, 40), (38, 145, 86), (214, 48, 60)
ROW, MOST_ROWS = 21, 20  # of a table: height in pixels, and how many rows are drawn
LETTER = 22  # of pictures 600 wide that nodes show about 400 wide: as large there as the text of an input
LEVELS = {"good": GREEN, "doubtful": (205, 135, 20), "bad": ALARM}


def blank(width: int, height: int) -> Image.Image:
    """A blank picture for a Pen, at SCALE times the size."""
    return Image.new("RGB", (width * SCALE, height * SCALE), PAPER)


def shrink(image: Image.Image) -> Image.Image:
    """The finished picture downscaled to its final size."""
    return image.resize((image.width // SCALE, image.height // SCALE), Image.Resampling.LANCZOS)


def stacked(*pictures: Image.Image) -> Image.Image:
    """The pictures, equally wide, one below the other."""
    whole = Image.new("RGB", (pictures[0].width, sum(picture.height for picture in pictures)), PAPER)
    y = 0
    for picture in pictures:
        whole.paste(picture, (0, y))
        y += picture.height
    return whole


def draw_table(header: list[str], rows: list[list[str]], width: int, marked=frozenset()) -> Image.Image:
    """Rows of texts in right-aligned columns. Of more than MOST_ROWS, evenly spaced ones are drawn, and the first of
    the `marked` ones (row numbers), which are red."""
    last = len(rows) - 1
    shown = {round(i * last / (MOST_ROWS - 1)) for i in range(MOST_ROWS)} if last >= MOST_ROWS else set(range(last + 1))
    shown = sorted(shown | set(sorted(marked)[:1]))
    image = blank(width, ROW * (len(shown) + 2))
    pen = Pen(image)
    for number, row in enumerate([header, *(rows[i] for i in shown)]):
        y = ROW * (number + 0.5)
        if number % 2:
            pen.box(0, y - ROW / 2, width, y + ROW / 2, GRID, 110)
        colour = SOFT if number == 0 else ALARM if shown[number - 1] in marked else INK
        for column, text in enumerate(row):
            pen.text((column + 1) * width / (len(row) + 0.3), y, text, 14, colour, "rm")
    if len(shown) < len(rows):
        pen.text(width - 20, ROW * (len(shown) + 1.5), f"{len(shown)} of {len(rows)} rows", 13, SOFT, "rm")
    return shrink(image)


def as_images(picture: Image.Image) -> torch.Tensor:
    """A picture as a ComfyUI IMAGE [1, H, W, 3]."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]


class Pen:
    """Draws on an image at SCALE times the given coordinates."""

    def __init__(self, image):
        self.draw = ImageDraw.Draw(image, "RGBA")

    def text(self, x, y, text, size, colour=INK, anchor="lt"):
        self.draw.text((x * SCALE, y * SCALE), text, colour, ImageFont.load_default(size * SCALE), anchor)

    def width(self, text, size):
        return ImageFont.load_default(size * SCALE).getlength(text) / SCALE

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
