"""Frames of video files and image folders for training: counted, chosen in time, read, fitted to a size."""
from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from random import Random

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.video import hearing_cancel

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def images_in(folder: Path) -> list[Path]:
    """The folder's images in the order of the numbers in their names (2 before 10)."""
    return sorted((path for path in folder.iterdir() if path.suffix.lower() in IMAGES),
                  key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)])


def open_video(path: Path) -> av.container.InputContainer:
    """Open a file that has pictures in it; ValueError says what else it is."""
    try:
        container = av.open(str(path))
    except av.error.FFmpegError as error:
        raise ValueError(f"cut off, or no video ({error.strerror})") from error
    if not container.streams.video or container.format.name == "tty":  # ffmpeg would draw a text file as a terminal
        container.close()
        raise ValueError("no video, there are no pictures in it")
    return container


def decode(path: Path, numbers: Collection[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number, frame [H, W, 3] uint8, upright) for these frames of a file; ValueError at what is damaged."""
    last = max(numbers)
    with open_video(path) as container:
        try:
            for number, frame in enumerate(hearing_cancel(container.decode(video=0))):
                if number in numbers:
                    yield number, np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                if number == last:
                    return
        except av.error.FFmpegError as error:
            raise ValueError(f"damaged ({error.strerror})") from error
    raise ValueError(f"damaged, it ends before frame {last}")


def iterate_frames(path: Path, numbers: Collection[int]) -> Iterator[tuple[int, np.ndarray]]:
    """As `decode`, of a folder of images too. A video is decoded from its beginning, so cut long ones into clips.

    ValueError also where the frames differ in size.
    """
    found = decode(path, numbers)
    if path.is_dir():
        images = images_in(path)
        found = ((number, next(decode(images[number], (0,)))[1]) for number in sorted(numbers))
    shape = None
    for number, frame in found:
        if frame.shape != (shape := shape or frame.shape):
            raise ValueError("its frames have different sizes")
        yield number, frame


def count_frames(path: Path) -> int:
    """How many frames a video, an image (1) or a folder of images has, without decoding them.

    ValueError says what is wrong with a file that is no video or was cut off.
    """
    if path.is_dir():
        return len(images_in(path))
    with open_video(path) as container:
        try:
            packets = [packet for packet in hearing_cancel(container.demux(video=0))
                       if packet.size and not packet.is_discard]
        except av.error.FFmpegError as error:
            raise ValueError(f"damaged ({error.strerror})") from error
    if not packets:
        raise ValueError("cut off or empty, it has no frames")
    if any(packet.is_corrupt for packet in packets):
        raise ValueError(f"cut off or damaged after {len(packets)} frames")
    return len(packets)


def read_frames(path: Path, numbers: list[int]) -> Tensor:
    """Frames of these numbers as uint8 [T, H, W, 3]; ValueError as `iterate_frames`."""
    found = dict(iterate_frames(path, set(numbers)))
    return torch.from_numpy(np.stack([found[number] for number in numbers]))


def frames_needed(frames: int, stride: int) -> int:
    """Shortest clip that gives `frames` frames (see pick_frames)."""
    return (frames - 1) * stride + 1 if stride else frames


def pick_frames(count: int, frames: int, stride: int, rng: Random) -> list[int]:
    """Numbers of the frames taken from a clip of `count`.

    stride 0: evenly from the first to the last, so that the caption fits whatever the length. Otherwise every
    `stride`-th frame from a place drawn by `rng`, which keeps the speed.
    """
    if stride:
        first = rng.randrange(count - frames_needed(frames, stride) + 1)
        return list(range(first, first + frames * stride, stride))
    return [round(i * (count - 1) / max(1, frames - 1)) for i in range(frames)]


def fit_frames(frames_THWC: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 frames resized to cover (height, width) and cropped at the middle: nothing is stretched."""
    height, width = size
    given_height, given_width = frames_THWC.shape[1:3]
    if (given_height, given_width) == size:
        return frames_THWC
    scale = max(height / given_height, width / given_width)
    covering = max(height, round(given_height * scale)), max(width, round(given_width * scale))
    video_TCHW = F.interpolate(frames_THWC.movedim(-1, 1).float(), covering, mode="bilinear", antialias=True)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    cropped = video_TCHW[:, :, top:top + height, left:left + width]
    return cropped.movedim(1, -1).round().clamp(0, 255).byte()
