"""Drawn scenes of 96x96: a patterned object that moves over a background, or an image under a moving camera.

An `ObjectScene` or a `CameraScene` fully describes a clip. One fifth of the shape x colour x direction combinations
(`is_held_out`) and the last caption template of each kind (`HELD_OUT_FORM`) are held out from training.
Lengths are in pixels; x points right, y down; outlines are anti-aliased over one pixel.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

SIZE = 96
SHAPES = ("circle", "square", "triangle", "star")
PATTERNS = ("plain", "striped", "ringed")
COLOURS = {"red": (225, 45, 45), "green": (45, 175, 70), "blue": (55, 90, 235), "yellow": (240, 215, 50),
           "magenta": (200, 60, 200), "cyan": (60, 200, 220)}  # RGB, 0..255
GROUNDS = {"black": (22, 22, 26), "white": (236, 236, 230), "grey": (124, 124, 126), "brown": (96, 62, 36)}
STYLES = ("plain", "gradient", "checked", "cloudy")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PICTURES = ("hills", "city")
MOVES = {"pans left": (-1, 0, 0), "pans right": (1, 0, 0), "pans up": (0, -1, 0), "pans down": (0, 1, 0),
         "zooms in": (0, 0, 1), "zooms out": (0, 0, -1)}  # of the camera: x, y, zoom

OBJECT_FORMS = (
    "a {look} moves {direction} on a {background}",
    "{look} moving {direction}, {background}",
    "on a {background} a {look} goes {direction}",
    "the {look} slides {direction} over a {background}",
)
CAMERA_FORMS = (
    "the camera {move} over {picture}",
    "{picture}, the camera {move}",
    "the camera {move}",
    "a view of {picture} while the camera {move}",
)
HELD_OUT_FORM = len(OBJECT_FORMS) - 1

FRAMES = 16
FS_RANGE = (18, 30)        # frames per second
MOTION = 21.0              # pixels per second: 1.17 per frame at 18 fps, 0.7 at 30
ZOOM = 0.36                # growth of log(scale) per second: 1.35 times in 15 frames at 18 fps
RADIUS_RANGE = (10.5, 13.0)
REACH = 1.54               # farthest point of any shape (a star's tip) from its centre, in radii


@dataclass(frozen=True)
class ObjectScene:
    """Positions are those of the object's centre in the first frame."""

    shape: str
    pattern: str
    colour: str
    ground: str
    style: str
    direction: str
    x: float
    y: float
    radius: float
    fs: int
    seed: int              # of the background texture
    returns: bool = False  # moves out and back, so that the last frame equals the first

    @property
    def speed(self) -> float:
        """Pixels per frame."""
        return MOTION / self.fs

    def caption(self, form: int = 0) -> str:
        look = " ".join((self.colour, *(() if self.pattern == "plain" else (self.pattern,)), self.shape))
        style = {"plain": "{} background", "gradient": "{} gradient background"}.get(self.style,
                                                                                    f"{self.style} {{}} background")
        return OBJECT_FORMS[form].format(look=look, direction=self.direction, background=style.format(self.ground))


@dataclass(frozen=True)
class CameraScene:
    """The image is drawn from its kind and seed. The camera starts `x`, `y` off the image's centre. `zoom` is the
    number of screen pixels per image pixel; images are designed for a side of 128."""

    picture: str
    move: str
    seed: int
    fs: int
    x: float = 0.0
    y: float = 0.0
    zoom: float = 0.75
    returns: bool = False

    def caption(self, form: int = 0) -> str:
        names = {"hills": "hills", "city": "a city"}
        return CAMERA_FORMS[form].format(move=self.move, picture=names[self.picture])


Scene = ObjectScene | CameraScene


def is_held_out(shape: str, colour: str, direction: str) -> bool:
    """One combination in five is held out for tests."""
    index = (SHAPES.index(shape) * 2 + list(COLOURS).index(colour) + list(DIRECTIONS).index(direction) * 3)
    return index % 5 == 0


def random_object(rng: Random, held_out: bool | None = False, returns: bool = False, frames: int = FRAMES,
                  fs: int | None = None) -> ObjectScene:
    """A scene with a training (False), held-out (True) or any (None) combination.

    Position, size and speed are drawn independently of the direction: the object stays inside for `frames` frames
    whichever way it moves.
    """
    while True:
        shape, colour, direction = rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(list(DIRECTIONS))
        if held_out is None or is_held_out(shape, colour, direction) == held_out:
            break
    fs, radius = fs or rng.randint(*FS_RANGE), rng.uniform(*RADIUS_RANGE)
    margin = min(SIZE / 2, REACH * radius + 1 + (frames - 1) * MOTION / fs)
    return ObjectScene(shape, rng.choice(PATTERNS), colour, rng.choice(list(GROUNDS)), rng.choice(STYLES), direction,
                       x=rng.uniform(margin, SIZE - margin), y=rng.uniform(margin, SIZE - margin), radius=radius,
                       fs=fs, seed=rng.randrange(2**31), returns=returns)


def random_camera(rng: Random, returns: bool = False) -> CameraScene:
    return CameraScene(rng.choice(PICTURES), rng.choice(list(MOVES)), rng.randrange(2**31), rng.randint(*FS_RANGE),
                       x=rng.uniform(-12, 12), y=rng.uniform(-12, 12), zoom=rng.uniform(0.7, 0.9), returns=returns)


def travelled(frames: int, returns: bool) -> Tensor:
    """Frames of motion up to each frame [T]."""
    t = torch.arange(frames, dtype=torch.float32)
    return torch.minimum(t, t.flip(0)) if returns else t


def draw(scene: Scene, frames: int = FRAMES) -> Tensor:
    """A clip as uint8 RGB frames [T, H, W, 3]."""
    drawn = draw_object(scene, frames) if isinstance(scene, ObjectScene) else draw_camera(scene, frames)
    return drawn.clamp(0, 255).round().to(torch.uint8)


# ---- an object over a background ---------------------------------------------------------------------------------

def signed_distance(shape: str, dx: Tensor, dy: Tensor, radius: float) -> Tensor:
    """Signed distance to the outline in pixels, negative inside. The area is about that of a circle of `radius`."""
    if shape == "circle":
        return (dx * dx + dy * dy).sqrt() - radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - radius * 0.886
    if shape == "triangle":  # upright, with its tip 1.4 radii above the centre
        return torch.maximum(dy, 0.866 * dx.abs() - 0.5 * dy) - radius * 0.7
    tenth = math.pi / 5      # a star: each half of an arm is the same triangle, rotated and mirrored
    angle = (((torch.atan2(dx, -dy) + tenth) % (2 * tenth)) - tenth).abs()
    length = (dx * dx + dy * dy).sqrt()
    along, across = length * angle.cos() - REACH * radius, length * angle.sin()
    notch = 0.45 * REACH * radius
    edge = (notch * math.cos(tenth) - REACH * radius, notch * math.sin(tenth))
    return (along * edge[1] - across * edge[0]) / math.hypot(*edge)


def paint(canvas_HW3: Tensor, cover_HW: Tensor, colour) -> Tensor:
    """The canvas with a colour blended in, opaque where `cover` is 1."""
    return torch.lerp(canvas_HW3, torch.as_tensor(colour, dtype=torch.float32), cover_HW[..., None])


def second_tone(scene: ObjectScene) -> Tensor:
    """The pattern's second colour, of the same hue: lighter, or darker on a white background."""
    colour = torch.tensor(COLOURS[scene.colour], dtype=torch.float32)
    return colour * 0.5 if scene.ground == "white" else 255 - (255 - colour) * 0.42


def draw_ground(scene: ObjectScene) -> Tensor:
    """[H, W, 3] float: plain, a linear gradient, a two-tone checkerboard, or soft waves."""
    rng, axis = Random(scene.seed), torch.arange(SIZE) + 0.5
    y, x = axis[:, None], axis[None, :]
    tone = torch.zeros(SIZE, SIZE)
    if scene.style == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        tone = ((x - SIZE / 2) * math.cos(angle) + (y - SIZE / 2) * math.sin(angle)) * 0.6
    elif scene.style == "checked":
        edge, shift = rng.uniform(11, 16), (rng.uniform(0, 32), rng.uniform(0, 32))
        wave = [((((a + s) / edge) % 2 - 1).abs() - 0.5) * edge for a, s in zip((x, y), shift)]
        tone = 16 * (2 * wave[0]).clamp(-1, 1) * (2 * wave[1]).clamp(-1, 1)
    elif scene.style == "cloudy":
        for _ in range(4):
            angle, period = rng.uniform(0, 2 * math.pi), rng.uniform(24, 55)
            phase = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period)
            tone = tone + 9 * (phase + rng.uniform(0, 2 * math.pi)).sin()
    return torch.tensor(GROUNDS[scene.ground]) + tone[..., None]


def draw_object(scene: ObjectScene, frames: int) -> Tensor:
    """[T, H, W, 3] float."""
    step_x, step_y = DIRECTIONS[scene.direction]
    way = travelled(frames, scene.returns) * scene.speed
    axis = torch.arange(SIZE) + 0.5
    dx_TW, dy_TH = (axis[None] - start - step * way[:, None] for start, step in ((scene.x, step_x), (scene.y, step_y)))
    dx, dy = torch.broadcast_tensors(dx_TW[:, None, :], dy_TH[:, :, None])
    distance = signed_distance(scene.shape, dx, dy, scene.radius)
    inside = torch.tensor(COLOURS[scene.colour], dtype=torch.float32).expand(*distance.shape, 3)
    if scene.pattern != "plain":
        width = 0.42 * scene.radius
        across = (dx + dy) * math.sqrt(0.5) if scene.pattern == "striped" else distance
        stripes = ((across / width) % 2 - 1).abs() * width - width / 2  # signed distance to the nearest change of tone
        inside = paint(inside, (stripes + 0.5).clamp(0, 1), second_tone(scene))
    return torch.lerp(draw_ground(scene).expand_as(inside), inside, (0.5 - distance).clamp(0, 1)[..., None])


# ---- an image under a moving camera ----------------------------------------------------------------------------------

def draw_camera(scene: CameraScene, frames: int) -> Tensor:
    """[T, H, W, 3] float. The world's origin is the centre of the image."""
    move_x, move_y, grows = MOVES[scene.move]
    way = travelled(frames, scene.returns) / scene.fs
    scale_T11 = (scene.zoom * (grows * ZOOM * way).exp())[:, None, None]  # screen pixels per world pixel
    axis = torch.arange(SIZE) + 0.5 - SIZE / 2
    x = (axis[None, None, :] + move_x * MOTION * way[:, None, None]) / scale_T11 + scene.x
    y = (axis[None, :, None] + move_y * MOTION * way[:, None, None]) / scale_T11 + scene.y
    x, y = torch.broadcast_tensors(x, y)
    return {"hills": draw_hills, "city": draw_city}[scene.picture](Random(scene.seed), x, y, scale_T11)


def random_colour(rng: Random, low: int = 30, high: int = 235) -> Tensor:
    return torch.tensor([rng.uniform(low, high) for _ in range(3)])


def sky(rng: Random, y: Tensor) -> Tensor:
    """Vertical gradient between two colours over 160 pixels."""
    upper, lower = random_colour(rng, 40, 200), random_colour(rng, 120, 240)
    return torch.lerp(upper, lower, (y / 160 + 0.5).clamp(0, 1)[..., None])


def sun(rng: Random, canvas: Tensor, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    place, radius = (rng.uniform(-50, 50), rng.uniform(-52, -25)), rng.uniform(8, 16)
    distance = signed_distance("circle", x - place[0], y - place[1], radius)
    return paint(canvas, (0.5 - distance * scale).clamp(0, 1), (250, rng.uniform(200, 245), rng.uniform(110, 200)))


def draw_hills(rng: Random, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Sky, sun and three ranges of hills, each darker than the one behind it."""
    canvas = sun(rng, sky(rng, y), x, y, scale)
    colour = random_colour(rng, 90, 200)
    for nearness in range(3):
        height = torch.full_like(x, rng.uniform(-18, -6) + 22 * nearness)
        for _ in range(3):
            period = rng.uniform(50, 140)
            height = height + rng.uniform(2, 8) * (x * (2 * math.pi / period) + rng.uniform(0, 6.3)).sin()
        canvas = paint(canvas, ((y - height) * scale + 0.5).clamp(0, 1), colour * (0.85, 0.62, 0.42)[nearness])
    return canvas


def draw_city(rng: Random, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Sky, sun and two rows of flat-roofed houses; the front row has windows."""
    canvas = sun(rng, sky(rng, y), x, y, scale)
    base = random_colour(rng, 60, 170)
    for row, ground in enumerate((34.0, 48.0)):
        left = -150.0 + rng.uniform(0, 20)
        while left < 150:
            width, top = rng.uniform(26, 46), ground - rng.uniform(14, 58)
            colour = base * rng.uniform(0.8, 1.2) * (1.0, 0.55)[row]
            middle, half = left + width / 2, width / 2 - 1
            distance = torch.maximum((x - middle).abs() - half, top - y)
            canvas = paint(canvas, (0.5 - distance * scale).clamp(0, 1), colour)
            if row:
                window = torch.maximum(((x - middle) % 16 - 8).abs() - 3.5, ((y - top) % 18 - 9).abs() - 4.5)
                lit = torch.maximum(window, distance + 4)
                canvas = paint(canvas, (0.5 - lit * scale).clamp(0, 1), (235, 215, 140))
            left += width
    return paint(canvas, ((y - 48) * scale + 0.5).clamp(0, 1), base * 0.35)
