"""Compares a video with the ground truth: PSNR, SSIM and motion error, using scikit-image."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.extras import import_extra
from ..common.video import hearing_cancel

SAME = 100.0           # dB reported for identical frames
SSIM_WINDOW = 11       # pixels: size of the Gaussian window in the paper
FLOW_EDGE = 128        # maximum side, in pixels, of the frames on which motion is measured
FLOW_RADIUS = 7        # pixels
MOVING = 0.1           # pixels per frame: anything slower counts as static
HEADER = ["", "PSNR dB", "SSIM", "motion error"]
MOTION_ERROR = "Motion error: difference of the motion in both videos in pixels per frame, where either of them moves."
STRUCTURE = 0.05       # fraction of the brightness range: where it varies less, motion cannot be measured


@dataclass(frozen=True)
class Scores:
    """Metrics per clip and frame, arrays [clips, T]; for motion [clips, T - 1], from each frame to the next."""

    psnr: np.ndarray    # dB
    ssim: np.ndarray    # 1: identical
    motion: np.ndarray  # pixels per frame

    def mean(self) -> tuple[float, float, float | None]:
        """Mean PSNR, SSIM and motion error; no motion error for clips of one frame."""
        return float(self.psnr.mean()), float(self.ssim.mean()), float(self.motion.mean()) if self.motion.size else None

    def table(self) -> str:
        """The rows as a text table."""
        lines = [f"{name:<10}{psnr:>10}{ssim:>10}{motion:>14}" for name, psnr, ssim, motion in (HEADER, *self.rows())]
        return "\n".join([*lines, "", MOTION_ERROR])

    def rows(self) -> list[list[str]]:
        """Texts for HEADER: the overall means, the means per clip if there are several, and the means per frame."""
        def row(name: str, psnr: float, ssim: float, motion: float | None) -> list[str]:
            return [name, f"{psnr:.2f}", f"{ssim:.4f}", "" if motion is None else f"{motion:.3f}"]

        rows = [row("mean", *self.mean())]
        if len(self.psnr) > 1:
            rows += [row(f"clip {i + 1}", *Scores(self.psnr[i], self.ssim[i], self.motion[i]).mean())
                     for i in range(len(self.psnr))]
        motion = [None, *self.motion.mean(0)]
        return rows + [row(f"frame {i + 1}", self.psnr[:, i].mean(), self.ssim[:, i].mean(), motion[i])
                       for i in range(self.psnr.shape[1])]


def compare(result_NHWC: Tensor, truth_NHWC: Tensor, clip_frames: int = 0) -> Scores:
    """Compare a video, RGB in 0..1, with the true one; `clip_frames` above 0: consecutive clips of that length.

    PSNR; SSIM with the Gaussian window of Wang et al. (2004); motion error: the mean distance between the optical flow
    (iterative Lucas-Kanade, Le Besnerais and Champagnat 2005) of both videos from one frame to the next, over textured
    areas where either moves. Raises ValueError if the videos do not match.
    """
    result, truth = (images_NHWC[..., :3].float().cpu().clamp(0, 1) for images_NHWC in (result_NHWC, truth_NHWC))
    if result.shape != truth.shape:
        raise ValueError(f"The result has {_words(result)}, the truth {_words(truth)}. Both must be the same. Cut the "
                         "longer one with Image From Batch, or resize one of them.")
    if min(truth.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"The frames are {truth.shape[2]}x{truth.shape[1]}. SSIM needs at least {SSIM_WINDOW} pixels "
                         "on each side. Use larger frames.")
    if not torch.isfinite(result).all() or not torch.isfinite(truth).all():
        raise ValueError("The frames have NaN or infinite pixels. Find the cause with Sampling Report.")
    length = clip_frames or len(truth)
    if clip_frames < 0 or len(truth) % length:
        raise ValueError(f"clip_frames is {clip_frames}, but there are {len(truth)} frames. Set it to 0 (one clip), or "
                         "to a number that divides them.")
    metrics = import_extra("skimage.metrics", "scikit-image", "Evaluate Video")
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(result, truth)]
    psnr = [SAME if np.array_equal(a, b) else min(SAME, metrics.peak_signal_noise_ratio(b, a, data_range=1))
            for a, b in hearing_cancel(pairs)]
    ssim = [metrics.structural_similarity(b, a, data_range=1, channel_axis=2, gaussian_weights=True, sigma=1.5,
                                          use_sample_covariance=False)
            for a, b in hearing_cancel(pairs)]
    motion = [_motion_errors(a, b) for a, b in zip(result.split(length), truth.split(length))]
    return Scores(np.array(psnr).reshape(-1, length), np.array(ssim).reshape(-1, length),
                  np.array(motion).reshape(len(motion), length - 1))


def _words(images_NHWC: Tensor) -> str:
    return f"{images_NHWC.shape[0]} frames of {images_NHWC.shape[2]}x{images_NHWC.shape[1]}"


def _motion_errors(result_THWC: Tensor, truth_THWC: Tensor) -> list[float]:
    axis_3, low, range_ = _brightness(truth_THWC)
    height, width = truth_THWC.shape[1:3]
    scale = min(1.0, FLOW_EDGE / max(height, width))
    small = (round(height * scale), round(width * scale))

    def grey(frame_HWC: Tensor) -> np.ndarray:
        grey_11HW = ((frame_HWC @ axis_3 - low) / range_)[None, None]
        if scale < 1:
            grey_11HW = F.interpolate(grey_11HW, small, mode="bilinear", antialias=True)
        return grey_11HW[0, 0].numpy()

    videos = [_flow([grey(frame_HWC) for frame_HWC in hearing_cancel(video_THWC)], scale)
              for video_THWC in (result_THWC, truth_THWC)]
    errors = []
    for (flow_2HW, visible_HW), (true_flow_2HW, truly_visible_HW) in zip(*videos):
        places_HW = (visible_HW & (np.hypot(*flow_2HW) >= MOVING)) | (
            truly_visible_HW & (np.hypot(*true_flow_2HW) >= MOVING))
        distance_HW = np.hypot(*(flow_2HW - true_flow_2HW))
        errors.append(float(distance_HW[places_HW].mean()) if places_HW.any() else 0.0)
    return errors


def _flow(grey_THW: list[np.ndarray], scale: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(flow [2, H, W] in pixels of the full-size frame, mask of textured areas [H, W]) from each frame to the next."""
    registration = import_extra("skimage.registration", "scikit-image", "Evaluate Video")
    from scipy.ndimage import uniform_filter  # a dependency of scikit-image
    window = 2 * FLOW_RADIUS + 1
    for here_HW, next_HW in hearing_cancel(zip(grey_THW, grey_THW[1:])):
        spread_HW = uniform_filter(here_HW ** 2, window) - uniform_filter(here_HW, window) ** 2
        yield registration.optical_flow_ilk(here_HW, next_HW, radius=FLOW_RADIUS) / scale, spread_HW >= STRUCTURE ** 2


def _brightness(truth_THWC: Tensor) -> tuple[Tensor, float, float]:
    """(colour axis [3], lowest value, range): the axis along which the true colours vary most.

    Plain brightness may not separate a blue shape from a grey background.
    """
    mean_3 = sum(frame_HWC.double().mean((0, 1)) for frame_HWC in hearing_cancel(truth_THWC)) / len(truth_THWC)
    spread_33 = torch.zeros(3, 3, dtype=torch.float64)
    for frame_HWC in hearing_cancel(truth_THWC):
        centred_N3 = frame_HWC.reshape(-1, 3).double() - mean_3
        spread_33 += centred_N3.T @ centred_N3
    axis_3 = torch.linalg.eigh(spread_33).eigenvectors[:, -1].float()
    ranges = [torch.aminmax(frame_HWC @ axis_3) for frame_HWC in hearing_cancel(truth_THWC)]
    low, high = min(found.min.item() for found in ranges), max(found.max.item() for found in ranges)
    return axis_3, low, max(high - low, 1e-3)
