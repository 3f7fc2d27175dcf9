"""Track one uniform shape on a uniform background: colours, path and direction.

Knows nothing about how such clips are drawn: it gets only frames and the palette's names and colours.
"""
from dataclasses import dataclass

import numpy as np

MIN_MOTION = 2.5      # pixels between first and last frame below which a shape counts as standing still
MIN_DOMINANCE = 1.5   # ratio of motion along the main axis to the other one
MIN_ORDER = 0.8       # rank correlation of position and time; shuffled frames stay below it
MIN_AREA = 20         # pixels; less is not a shape
WINDOW, SPOT = 9 / 64, 4 / 64  # in sides of the frame: half width of the search window, and of the densest spot in it


@dataclass(frozen=True)
class Track:
    """The result for T frames; a name is None if no single name fits every frame."""

    background: str | None
    colour: str | None
    direction: str | None
    path_T2: np.ndarray    # centroid x, y in pixels, NaN where no shape was found
    motion: tuple[float, float]  # fitted displacement x, y from first to last frame in pixels


def nearest(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]], limit: float = 75.0) -> str | None:
    """Name of the closest palette colour, None if none lies within `limit` (0..255 RGB distance)."""
    distances = {name: float(np.linalg.norm(rgb - np.array(colour))) for name, colour in palette.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] <= limit else None


def same_name(colours_TC: np.ndarray, palette: dict) -> str | None:
    """The name shared by all frames' colours, None if they differ or have none."""
    names = {nearest(colour, palette) for colour in colours_TC}
    return names.pop() if len(names) == 1 else None


def border(frame_HWC: np.ndarray) -> np.ndarray:
    """Median colour of the outermost two pixels."""
    edges = (frame_HWC[:2], frame_HWC[-2:], frame_HWC[:, :2], frame_HWC[:, -2:])
    return np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)


def box_sum(image_HW: np.ndarray, half: int) -> np.ndarray:
    """Sum over the (2 half + 1) square around every pixel."""
    total = np.pad(image_HW, half + 1).cumsum(0).cumsum(1)
    side = 2 * half + 1
    return (total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side])[
        : image_HW.shape[0], : image_HW.shape[1]]


def find_shape(frame_HWC: np.ndarray, ground: np.ndarray):
    """(centroid x, y; colour) of what stands out from the background, or None."""
    distance = np.linalg.norm(frame_HWC - ground, axis=-1)
    peak = np.percentile(distance, 99.5)  # about 20 pixels of 64 x 64: the shape's interior
    if peak < 30:
        return None
    cover = np.clip(distance / peak, 0, 1) * (distance > 0.3 * peak)
    window, spot = (round(share * frame_HWC.shape[1]) for share in (WINDOW, SPOT))
    y, x = np.unravel_index(box_sum(cover, spot).argmax(), cover.shape)
    rows, cols = np.indices(cover.shape)
    cover[(abs(rows - y) > window) | (abs(cols - x) > window)] = 0
    inside = cover > 0.75
    if inside.sum() < MIN_AREA:
        return None
    centre = np.array([(cover * (cols + 0.5)).sum(), (cover * (rows + 0.5)).sum()]) / cover.sum()
    return centre, np.median(frame_HWC[inside], axis=0)


def rank(values: np.ndarray) -> np.ndarray:
    return values.argsort().argsort().astype(float)


def find_direction(path_T2: np.ndarray, directions: dict[str, tuple[int, int]]):
    """(name or None, fitted displacement) of a path. A name needs enough motion, along one axis, in temporal order."""
    time = np.arange(len(path_T2))
    motion = np.polyfit(time, path_T2, 1)[0] * (len(path_T2) - 1)
    axis = int(abs(motion).argmax())
    order = np.corrcoef(rank(path_T2[:, axis]), time)[0, 1]
    moves = (abs(motion[axis]) >= MIN_MOTION and abs(motion[axis]) >= MIN_DOMINANCE * abs(motion[1 - axis])
             and abs(order) >= MIN_ORDER)
    step = np.zeros(2)
    step[axis] = np.sign(motion[axis])
    name = next((n for n, d in directions.items() if tuple(d) == tuple(step)), None) if moves else None
    return name, (float(motion[0]), float(motion[1]))


def track(frames_THWC: np.ndarray, colours: dict, backgrounds: dict, directions: dict) -> Track:
    """Track the shape in frames [T,H,W,3] (uint8, or float in 0..1); the palettes are name -> RGB 0..255 and x, y."""
    frames = np.asarray(frames_THWC)
    frames = frames.astype(np.float32) * (1 if frames.dtype == np.uint8 else 255)
    grounds = np.stack([border(frame) for frame in frames])
    background = same_name(grounds, backgrounds)
    found = [find_shape(frame, ground) for frame, ground in zip(frames, grounds)]
    path = np.stack([np.full(2, np.nan) if f is None else f[0] for f in found])
    if any(f is None for f in found):
        return Track(background, None, None, path, (0.0, 0.0))
    direction, motion = find_direction(path, directions)
    return Track(background, same_name(np.stack([f[1] for f in found]), colours), direction, path, motion)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images, at most 99."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return min(99.0, float(10 * np.log10(255**2 / max(error, 1e-9))))
