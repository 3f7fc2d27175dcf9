"""Moving Shapes: procedurally drawn clips of one shape on a plain background, with captions.

A `ShapeClip` fully describes a clip. One fifth of the shape x colour x direction combinations (`is_held_out`) and the
last caption template (`HELD_OUT_FORM`) are held out from training.
"""
from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (225, 45, 45), "green": (45, 175, 70), "blue": (55, 90, 235), "yellow": (240, 215, 50),
           "magenta": (200, 60, 200), "cyan": (60, 200, 220)}  # RGB, 0..255
BACKGROUNDS = {"black": (16, 16, 18), "white": (238, 238, 234), "grey": (122, 122, 124), "brown": (96, 62, 36)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x, y in image coordinates

CAPTION_FORMS = (
    "a {colour} {shape} moves {direction} on a {background} background",
    "{colour} {shape} moving {direction}, {background} background",
    "on {background} ground a {colour} {shape} goes {direction}",
    "the {colour} {shape} slides {direction} over a {background} background",
)
HELD_OUT_FORM = len(CAPTION_FORMS) - 1

MAX_FRAMES = 32         # a shape stays inside the frame for this long
FS_RANGE = (18, 30)     # frames per second; the shape moves MOTION / fs pixels per frame
MOTION = 12.0           # pixels per second in a 64 pixel frame: 0.67 per frame at 18 fps, 0.4 at 30


@dataclass(frozen=True)
class ShapeClip:
    """One clip. Lengths are in pixels, positions are those of the shape's centre in the first frame."""

    shape: str
    colour: str
    background: str
    direction: str
    x: float
    y: float
    radius: float
    fs: int               # frames per second
    returns: bool = False  # moves out and back, so that the last frame equals the first
    size: int = 64         # side of the square frame

    @property
    def speed(self) -> float:
        """Pixels per frame."""
        return MOTION / self.fs * self.size / 64

    def caption(self, form: int = 0) -> str:
        return CAPTION_FORMS[form].format(**vars(self))


def is_held_out(shape: str, colour: str, direction: str) -> bool:
    """One combination in five is held out for tests."""
    index = (SHAPES.index(shape) * 2 + list(COLOURS).index(colour) + list(DIRECTIONS).index(direction) * 3)
    return index % 5 == 0


def random_clip(rng: Random, held_out: bool | None = False, returns: bool = False) -> ShapeClip:
    """A clip with a training (False), held-out (True) or any (None) combination.

    Position, size and speed are drawn independently of the direction: the shape stays inside for `MAX_FRAMES` frames
    whichever way it moves.
    """
    while True:
        shape, colour, direction = rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(list(DIRECTIONS))
        if held_out is None or is_held_out(shape, colour, direction) == held_out:
            break
    fs, radius = rng.randint(*FS_RANGE), rng.uniform(4.5, 6.0)
    margin = 1.4 * radius + 1 + (MAX_FRAMES - 1) * MOTION / fs
    return ShapeClip(shape, colour, rng.choice(list(BACKGROUNDS)), direction, x=rng.uniform(margin, 64 - margin),
                     y=rng.uniform(margin, 64 - margin), radius=radius, fs=fs, returns=returns)


def signed_distance(shape: str, dx: Tensor, dy: Tensor, radius: float) -> Tensor:
    """Signed distance to the outline in pixels, negative inside. The area is about that of a circle of `radius`."""
    if shape == "circle":
        return (dx * dx + dy * dy).sqrt() - radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - radius * 0.886
    inner = radius * 0.7  # inscribed radius of an upright equilateral triangle with its tip 1.4 radii from the centre
    return torch.maximum(dy, 0.866 * dx.abs() - 0.5 * dy) - inner


def draw_clip(clip: ShapeClip, frames: int = 16) -> Tensor:
    """Draw a clip as uint8 RGB frames [T, H, W, 3], edges anti-aliased over one pixel."""
    t = torch.arange(frames, dtype=torch.float32)
    travelled = t * clip.speed
    if clip.returns:
        travelled = torch.minimum(travelled, travelled.flip(0))
    step_x, step_y = DIRECTIONS[clip.direction]
    axis = torch.arange(clip.size) + 0.5
    dx_TW = axis[None] - clip.x - step_x * travelled[:, None]
    dy_TH = axis[None] - clip.y - step_y * travelled[:, None]
    dx, dy = torch.broadcast_tensors(dx_TW[:, None, :], dy_TH[:, :, None])
    cover = (0.5 - signed_distance(clip.shape, dx, dy, clip.radius)).clamp(0, 1)[..., None]
    colour, ground = torch.tensor(COLOURS[clip.colour]), torch.tensor(BACKGROUNDS[clip.background])
    return (cover * colour + (1 - cover) * ground).round().to(torch.uint8)
