"""Frames of videos, images and image folders for training: timestamps, reading selected frames, fitting to a size.

FFmpeg gets an open file, not a file name, and may open nothing else: a playlist cannot refer to other files.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...common.images import fit_image
from ...common.pictures import PICTURES, in_order, list_folder, open_animation, open_picture
from ...common.video import hearing_cancel

NOTHING_ELSE = {"protocol_whitelist": "none"}
ORIENTATION = 0x0112  # EXIF tag


class Frame(NamedTuple):
    time: float                               # seconds
    pixels: Callable[[], np.ndarray]          # uint8 [H, W, 3], upright
    pixel_aspect: float = 1.0                 # pixel width / height


class Look(NamedTuple):
    """Properties of a clip, from its index and its first frame."""

    times: tuple[float, ...]                  # of the frames, ascending
    size: tuple[int, int]                     # (height, width) as displayed


def pictures_in(folder: Path) -> list[Path]:
    """The folder's images in numeric order of their names (2 before 10)."""
    return sorted((path for path in list_folder(folder)[0] if path.suffix.lower() in PICTURES and path.is_file()),
                  key=in_order)


def frames_of(path: Path) -> Iterator[Frame]:
    """All frames of a video, image or image folder, in order; ValueError for damaged data."""
    if path.is_dir():
        return (Frame(number, lambda picture=picture: np.asarray(open_picture(picture)))
                for number, picture in enumerate(pictures_in(path)))
    if path.suffix.lower() in PICTURES:
        return (Frame(time, lambda picture=picture: np.asarray(picture)) for time, picture in open_animation(path))
    return _video(path)


def _open(path: Path) -> av.container.InputContainer:
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"cannot be opened ({error.strerror})") from error
    try:
        container = av.open(file, options=NOTHING_ELSE)
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"cut off, or no video ({error.strerror})") from error
    if not container.streams.video or container.format.name == "tty":  # ffmpeg would render a text file as a terminal
        container.close()
        raise ValueError("no video, there are no pictures in it")
    return container


def _has_times(container: av.container.InputContainer) -> bool:
    """Whether timestamps are real: AVI only stores a frame rate, and its timestamps are decoding-order numbers."""
    return container.format.name != "avi"


def _video(path: Path) -> Iterator[Frame]:
    """Frames with their timestamps. Packets that cannot be decoded before the first frame (a recording cut between two
    key frames) are skipped."""
    with _open(path) as container:
        stream, number = container.streams.video[0], 0
        try:
            for packet in hearing_cancel(container.demux(stream)):
                try:
                    frames = packet.decode()
                except av.error.FFmpegError:
                    if number:
                        raise
                    continue
                for frame in frames:
                    stamped = _has_times(container) and frame.time is not None
                    turns = round(frame.rotation / 90)
                    aspect = float(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)
                    yield Frame(frame.time if stamped else number / float(stream.average_rate or 1),
                                lambda frame=frame, turns=turns: np.rot90(frame.to_ndarray(format="rgb24"), turns),
                                1 / aspect if turns % 2 else aspect)
                    number += 1
        except av.error.FFmpegError as error:
            raise ValueError(f"damaged ({error.strerror})") from error
    if not number:
        raise ValueError("damaged, none of its frames can be decoded")


def look(path: Path) -> Look:
    """Timestamps and size of a clip; for a video only the first frame is decoded.

    ValueError describes the problem if the file is not a clip, is truncated, or (folders) has images of mixed sizes.
    """
    if path.is_dir():
        pictures = pictures_in(path)
        sizes = {_size(picture) for picture in pictures}
        if not pictures:
            raise ValueError("there are no pictures in this folder")
        if len(sizes) > 1:
            raise ValueError("its frames have different sizes")
        return Look(tuple(map(float, range(len(pictures)))), sizes.pop())
    times = () if path.suffix.lower() in PICTURES else _packet_times(path)
    frames = frames_of(path)
    first = next(frames)
    height, width = first.pixels().shape[:2]
    if times:
        frames.close()
    else:
        times = (first.time, *(frame.time for frame in frames))
    return Look(tuple(time for time in times if time >= first.time - 1e-6), (height, round(width * first.pixel_aspect)))


def _size(picture: Path) -> tuple[int, int]:
    """(height, width) from the header, with the orientation applied."""
    try:
        with Image.open(picture) as opened:
            width, height = opened.size
            return (width, height) if opened.getexif().get(ORIENTATION, 1) > 4 else (height, width)
    except Exception as error:  # Pillow's readers raise many exception types for damaged files
        raise ValueError(f"{picture.name} is damaged, or no picture ({error})") from error


def _packet_times(path: Path) -> tuple[float, ...]:
    """Timestamps of a video's frames, without decoding them."""
    with _open(path) as container:
        stream = container.streams.video[0]
        try:
            packets = [packet for packet in hearing_cancel(container.demux(stream))
                       if packet.size and not packet.is_discard]
        except av.error.FFmpegError as error:
            raise ValueError(f"damaged ({error.strerror})") from error
        if not packets:
            raise ValueError("cut off or empty, it has no frames")
        if any(packet.is_corrupt for packet in packets):
            raise ValueError(f"cut off or damaged after {len(packets)} frames")
        if not _has_times(container) or any(packet.pts is None for packet in packets):
            return tuple(number / float(stream.average_rate or 1) for number in range(len(packets)))
        return tuple(sorted({float(packet.pts * packet.time_base) for packet in packets}))


def nearest(frames: Iterable[Frame], times: Iterable[float], ends: float) -> Iterator[Frame]:
    """For each of the ascending `times` the nearest frame; the earlier one if two are equally near.

    ValueError if the frames end before `ends`.
    """
    frames = iter(frames)
    here, after = next(frames), next(frames, None)
    for time in times:
        while after is not None and abs(after.time - time) < abs(here.time - time) - 1e-6:
            here, after = after, next(frames, None)
        if after is None and here.time < min(time, ends) - 1e-6:
            raise ValueError(f"damaged, it ends after {here.time:.2f} seconds, its index says {time:.2f} or more")
        yield here


def read_frames(path: Path, clip: Look, times: list[float], size: tuple[int, int]) -> Tensor:
    """The frames nearest to `times`, fitted to (height, width): float32 [T, H, W, 3] in 0..255.

    Each frame is resized as soon as it is decoded, so large ones do not fill the memory. A video is always decoded from
    its beginning, so split long videos into clips. ValueError for damaged data and for image folders with mixed sizes.
    """
    height, width = size
    fitted, last, shape = [], None, None
    for frame in nearest(frames_of(path), times, _least_end(clip)):
        if frame is not last:
            pixels = np.require(frame.pixels(), requirements=("C", "W"))
            if path.is_dir() and pixels.shape != (shape := shape or pixels.shape):
                raise ValueError("its frames have different sizes")
            fitted.append(fit_image(torch.from_numpy(pixels)[None], width, height, frame.pixel_aspect)[0] * 255)
        else:
            fitted.append(fitted[-1])
        last = frame
    return torch.stack(fitted)


def check_frames(path: Path, clip: Look) -> None:
    """Decode all frames of a clip; ValueError for damaged data."""
    for frame in nearest(frames_of(path), clip.times, _least_end(clip)):
        frame.pixels()


def _least_end(clip: Look) -> float:
    """Timestamp that an intact clip reaches at least: the last packets may belong to one frame."""
    return clip.times[-1] - 1.5 * (clip.times[-1] - clip.times[0]) / max(1, len(clip.times) - 1)


def frames_needed(frames: int, stride: int) -> int:
    """Minimum clip length, in frames, to get `frames` frames (see pick_times)."""
    return (frames - 1) * stride + 1 if stride else frames


def pick_times(times: tuple[float, ...], frames: int, stride: int, rng: Random) -> list[float]:
    """Timestamps of the frames to take from a clip whose frames are at `times`.

    stride 0: evenly from the first to the last, so that the caption fits at any clip length. Otherwise `stride` frames
    apart, at the clip's mean frame rate, from a start drawn by `rng`; this preserves the speed.
    """
    last = len(times) - 1
    if stride:
        first = rng.randrange(len(times) - frames_needed(frames, stride) + 1)
        numbers = range(first, first + frames * stride, stride)
    else:
        numbers = [i * last / max(1, frames - 1) for i in range(frames)]
    return [times[0] + number * (times[-1] - times[0]) / max(1, last) for number in numbers]
