"""Measure an object's outline and hue in a clip, and the camera's motion, from the frames alone.

Knows nothing about how clips are drawn. It gets frames, the true frames, and the background without the object.
Frames are [T, H, W, 3] uint8; positions are x, y in pixels.
"""
import colorsys
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

MIN_AREA = 60      # pixels; less is not an object
MIN_EDGE = 24.0    # RGB distance; less is background noise, not the object's colour
FLOW_BLUR = 2.0    # pixels, applied before the gradients


@dataclass(frozen=True)
class Outlines:
    """For T frames; NaN where no object was found."""

    iou_T: np.ndarray      # of the object and its true outline, after aligning their centres
    hue_error_T: np.ndarray  # degrees between the object's hue and the true object's
    path_T2: np.ndarray    # centre of the found object
    true_path_T2: np.ndarray


def segment_distance(rgb_HW3: np.ndarray, ends_23: np.ndarray) -> np.ndarray:
    """Distance of every colour from the segment between two colours."""
    start, line = ends_23[0], ends_23[1] - ends_23[0]
    along = ((rgb_HW3 - start) @ line) / max(float(line @ line), 1e-6)
    return np.linalg.norm(rgb_HW3 - start - along.clip(0, 1)[..., None] * line, axis=-1)


def object_colours(true_HW3: np.ndarray, ground_HW3: np.ndarray) -> np.ndarray:
    """The two colours [2, 3] that bound all colours of the object, from a true frame."""
    differs = np.linalg.norm(true_HW3 - ground_HW3, axis=-1)
    inside = ndimage.binary_erosion(differs > MIN_EDGE, iterations=2)
    colours = true_HW3[inside if inside.sum() >= MIN_AREA // 2 else differs > MIN_EDGE]
    middle = colours.mean(0)
    axis = np.linalg.svd(colours - middle, full_matrices=False)[2][0]
    return middle + np.percentile((colours - middle) @ axis, (2, 98))[:, None] * axis


def find_object(frame_HW3: np.ndarray, ground_HW3: np.ndarray, colours_23: np.ndarray) -> np.ndarray | None:
    """Mask [H, W] of the pixels closer to the object's colours than to the background at that pixel: the largest
    connected component, with holes filled. None if it is too small."""
    of_ground = np.linalg.norm(frame_HW3 - ground_HW3, axis=-1)
    mask = (segment_distance(frame_HW3, colours_23) < of_ground) & (of_ground > MIN_EDGE)
    labels, count = ndimage.label(mask)
    if count == 0:
        return None
    largest = labels == 1 + np.bincount(labels.ravel())[1:].argmax()
    return ndimage.binary_fill_holes(largest) if largest.sum() >= MIN_AREA else None


def middle_of(mask_HW: np.ndarray) -> np.ndarray:
    rows, cols = np.nonzero(mask_HW)
    return np.array([cols.mean() + 0.5, rows.mean() + 0.5])


def iou_at_place(found_HW: np.ndarray, true_HW: np.ndarray) -> float:
    """Intersection over union after moving the true mask to the centre of the found one."""
    x, y = middle_of(found_HW) - middle_of(true_HW)
    moved = ndimage.shift(true_HW.astype(np.float32), (y, x), order=1) >= 0.5
    return float((found_HW & moved).sum() / (found_HW | moved).sum())


def hue(rgb_N3: np.ndarray) -> float:
    """Hue of the mean colour, in degrees."""
    return 360 * colorsys.rgb_to_hsv(*(rgb_N3.mean(0) / 255))[0]


def follow(frames_THWC: np.ndarray, true_THWC: np.ndarray, ground_HWC: np.ndarray) -> Outlines:
    """Compare the object in every frame with the true one. Raises ValueError if a true frame has no object."""
    frames, true, ground = (np.asarray(a, dtype=np.float32) for a in (frames_THWC, true_THWC, ground_HWC))
    colours = object_colours(true[0], ground)
    count = len(frames)
    ious, hues = np.zeros(count), np.full(count, np.nan)
    path, true_path = np.full((count, 2), np.nan), np.full((count, 2), np.nan)
    for i in range(count):
        true_mask = find_object(true[i], ground, colours)
        if true_mask is None:
            raise ValueError(f"The true frame {i} shows no object that differs from the ground.")
        true_path[i] = middle_of(true_mask)
        mask = find_object(frames[i], ground, colours)
        if mask is None:
            continue
        path[i], ious[i] = middle_of(mask), iou_at_place(mask, true_mask)
        inner, true_inner = (ndimage.binary_erosion(m, iterations=3) for m in (mask, true_mask))
        if inner.any() and true_inner.any():
            turn = hue(frames[i][inner]) - hue(true[i][true_inner])
            hues[i] = abs((turn + 180) % 360 - 180)
    return Outlines(ious, hues, path, true_path)


# ---- the camera ----------------------------------------------------------------------------------------------------

def flow_between(first_HW3: np.ndarray, second_HW3: np.ndarray, rounds: int = 4) -> np.ndarray:
    """(x, y, s): the picture's content moves by (x, y) pixels at its centre and scales by exp(s).

    Least squares on brightness and colour (Lucas and Kanade 1981, with one scale for the whole picture). Iterative:
    the second picture is warped back by the estimate and measured again.
    """
    height, width = first_HW3.shape[:2]
    first, second = (ndimage.gaussian_filter(a.astype(np.float32), (FLOW_BLUR, FLOW_BLUR, 0)) for a in
                     (first_HW3, second_HW3))
    rows, cols = np.mgrid[:height, :width].astype(np.float32)
    x, y = cols - (width - 1) / 2, rows - (height - 1) / 2
    edge = 8
    inner = (slice(edge, -edge), slice(edge, -edge))
    flow = np.zeros(3)
    for _ in range(rounds):
        scale = np.exp(flow[2])
        places = (y * scale + flow[1] + (height - 1) / 2, x * scale + flow[0] + (width - 1) / 2)
        back = np.stack([ndimage.map_coordinates(second[..., c], places, order=1, mode="nearest") for c in range(3)],
                        axis=-1)
        grad_y, grad_x = np.gradient(back, axis=(0, 1))
        columns = (grad_x, grad_y, grad_x * x[..., None] + grad_y * y[..., None])
        matrix = np.stack([column[inner].ravel() for column in columns], axis=1)
        flow = flow + np.linalg.lstsq(matrix, (first - back)[inner].ravel(), rcond=None)[0]
    return flow


def camera_flow(frames_THWC: np.ndarray) -> np.ndarray:
    """(x, y, s) from the first frame to the last, summed over consecutive frames."""
    return sum(flow_between(a, b) for a, b in zip(frames_THWC, frames_THWC[1:]))
