"""Frames to MP4, GIF and PNG bytes, and bytes to files without half-written results.

Every encoder returns the whole file as bytes: an encoded clip is far smaller than its frames, a failed or interrupted
encode leaves nothing behind, and the write itself is one temporary file and one rename.
"""
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image
from PIL.PngImagePlugin import PngInfo

FORMATS = ("mp4", "gif", "png frames")
BT709 = 1  # primaries and transfer in H.273; PyAV before 17 has no names for them
MAX_FPS = 240
MAX_GIF_FPS = 50  # a GIF counts in 1/100 s and browsers slow anything under 2/100 s down to 10/100 s


def frames_uint8(images_NHWC: torch.Tensor) -> Iterator[np.ndarray]:
    """Yield frames [H,W,3] uint8 from images [N,H,W,3 or 4] in 0..1, clamped and rounded; alpha is dropped.

    ValueError for another shape, no frames, or NaN / infinite pixels (named by frame), before the first frame.
    """
    if images_NHWC.ndim != 4 or images_NHWC.shape[-1] not in (3, 4):
        raise ValueError(f"images of shape {tuple(images_NHWC.shape)} were given; "
                         "frames must be [frames, height, width, 3 or 4 channels].")
    if 0 in images_NHWC.shape:
        raise ValueError(f"the video is empty (shape {tuple(images_NHWC.shape)}); give at least one frame.")
    bad = [i for i, frame in enumerate(images_NHWC) if not torch.isfinite(frame).all()]
    if bad:
        raise ValueError(f"NaN or infinite pixels in {len(bad)} of {len(images_NHWC)} frames (first: {bad[0]}); "
                         "nothing was saved. Look for the cause in the sampler or use the VAE in fp32.")
    return (frame[..., :3].float().clamp(0, 1).mul(255).round().byte().cpu().numpy() for frame in images_NHWC)


def frame_rate(fps: float | Fraction, form: str = "mp4") -> Fraction:
    """fps as an exact fraction that containers accept; ValueError outside what `form` can play."""
    highest = MAX_GIF_FPS if form == "gif" else MAX_FPS
    if not 0 < fps <= highest:
        raise ValueError(f"fps = {float(fps):g} was given; {form} allows more than 0 and at most {highest}.")
    return Fraction(fps).limit_denominator(1001)


def pad_to_even(frame_HWC: np.ndarray) -> np.ndarray:
    """Repeat the last row or column where a side is odd: 4:2:0 chroma needs even sides."""
    height, width = frame_HWC.shape[:2]
    return np.pad(frame_HWC, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def encode_mp4(frames: Iterable[np.ndarray], fps: float | Fraction, crf: int = 16, tags: dict | None = None,
               audio: dict | None = None) -> bytes:
    """H.264 4:2:0 MP4 of frames [H,W,3] uint8 of any size (odd sides are padded by one pixel, see pad_to_even).

    crf 1 (best) .. 51. tags: one container tag a key, values as JSON. audio: ComfyUI's AUDIO, cut at the last frame.
    """
    buffer = io.BytesIO()
    with _open_mp4(buffer, fps, crf, tags, audio) as add:
        for frame in frames:
            add(frame)
    return buffer.getvalue()


@contextmanager
def stream_mp4(path: str | Path, fps: float | Fraction, crf: int, tags: dict | None) -> Iterator[Callable]:
    """For videos longer than memory: yields add(frame), which encodes one more frame into the MP4 `path`.

    Frames and settings as in `encode_mp4`. The file appears when the with block ends; after an error in it, or an
    OSError in writing, none is left.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        with ExitStack() as stack:
            with saving(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                add = stack.enter_context(_open_mp4(stack.enter_context(part.open("wb")), fps, crf, tags, None))
            yield partial(_add_saving, path, add)
            with saving(path):
                stack.close()
                os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _add_saving(path: Path, add: Callable, frame: np.ndarray) -> None:
    with saving(path):
        add(frame)


@contextmanager
def _open_mp4(target, fps: float | Fraction, crf: int, tags: dict | None, audio: dict | None) -> Iterator[Callable]:
    """Yields add(frame), which encodes one more frame into the open file `target`."""
    if not 1 <= crf <= 51:
        raise ValueError(f"crf = {crf} was given; allowed are 1 (best) to 51 (smallest file).")
    rate = frame_rate(fps)
    # use_metadata_tags: without it the MP4 muxer drops every tag that is not in Apple's list
    with av.open(target, "w", format="mp4", options={"movflags": "use_metadata_tags"}) as container:
        for key, value in (tags or {}).items():
            container.metadata[key] = json.dumps(value)
        stream = container.add_stream("libx264", rate=rate)
        stream.pix_fmt, stream.options = "yuv420p", {"crf": str(crf)}
        # Players guess the matrix of untagged files by their size, and guess differently: say BT.709.
        codec = stream.codec_context
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries = codec.color_trc = BT709
        sound = container.add_stream("aac", rate=int(audio["sample_rate"])) if audio else None
        count = 0

        def add(frame: np.ndarray) -> None:
            nonlocal count
            frame = pad_to_even(frame)
            if count == 0:
                stream.height, stream.width = frame.shape[:2]
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709,
                                       dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(picture))
            count += 1

        yield add
        container.mux(stream.encode())
        if sound:
            _mux_audio(container, sound, audio, seconds=count / rate)


def _mux_audio(container, sound, audio: dict, seconds: Fraction) -> None:
    """Encode the first item of AUDIO (waveform [1,C,S] in -1..1) into the open container, as mono or stereo."""
    rate = int(audio["sample_rate"])
    wave_CS = audio["waveform"][0, :2, : int(seconds * rate)].float().cpu().contiguous().numpy()
    if wave_CS.shape[1] == 0:
        return
    chunk = av.AudioFrame.from_ndarray(wave_CS, format="fltp", layout="mono" if len(wave_CS) == 1 else "stereo")
    chunk.sample_rate, chunk.pts = rate, 0
    container.mux(sound.encode(chunk))
    container.mux(sound.encode())


def encode_gif(frames: Iterable[np.ndarray], fps: float | Fraction) -> bytes:
    """Looping GIF of frames [H,W,3] uint8: one palette made from all frames, so that still areas do not flicker."""
    rate = frame_rate(fps, "gif")
    pictures = [Image.fromarray(frame) for frame in frames]
    # A few thousand pixels of each frame are enough to choose 256 colours; whole clips would be slow.
    step = max(1, pictures[0].width * pictures[0].height // 4096)
    pixels = np.concatenate([np.asarray(p).reshape(-1, 3)[::step] for p in pictures])
    palette = Image.fromarray(pixels[None]).quantize(256, Image.Quantize.MEDIANCUT)
    indexed = [p.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for p in pictures]
    # Whole 1/100 s only: rounding the running time, not each frame, keeps the clip's length right.
    ends = [round(100 * (i + 1) / rate) for i in range(len(indexed))]
    durations = [10 * (end - start) for start, end in zip([0, *ends], ends)]
    buffer = io.BytesIO()
    indexed[0].save(buffer, "GIF", save_all=True, append_images=indexed[1:], duration=durations, loop=0, disposal=1,
                    optimize=False)
    return buffer.getvalue()


def encode_png(frame: np.ndarray, tags: dict | None = None) -> bytes:
    """One PNG of a frame [H,W,3] uint8; tags become text chunks, values as JSON, as ComfyUI's Save Image does."""
    info = PngInfo()
    for key, value in (tags or {}).items():
        info.add_text(key, json.dumps(value))
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG", pnginfo=info, compress_level=4)
    return buffer.getvalue()


def write_file(path: str | Path, data: bytes) -> None:
    """Write data to path by a temporary file in the same folder and one rename; OSError says what to do."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        with saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_folder(path: str | Path, files: Iterable[tuple[str, bytes]]) -> list[str]:
    """Write (name, data) pairs into the new folder `path`, all or nothing; return the names. OSError as write_file."""
    path = Path(path)
    part = None
    names = []
    try:
        with saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            part.chmod(0o755)  # mkdtemp makes a private folder, but other users may read the results
            for name, data in files:
                (part / name).write_bytes(data)
                names.append(name)
            part.rename(path)
    finally:
        if part:
            shutil.rmtree(part, ignore_errors=True)
    return names


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Words of advice for an OSError in here."""
    try:
        yield
    except OSError as error:
        raise save_error(path, error) from error


def save_error(path: Path, error: OSError) -> OSError:
    """The error to raise where writing `path` failed: same number, and words on what to do."""
    return OSError(error.errno, f"could not save {path}: {error.strerror or error}. Nothing was written. "
                                "Free space on the disk, or make the folder writable, or choose another one")


def save_video(videos: torch.Tensor, path: str | Path, fps: float, form: str = "mp4", crf: int = 16,
               tags: dict | None = None, audio: dict | None = None) -> list[str]:
    """Save frames [N,H,W,3] in 0..1 as the file `path` (mp4, gif) or as the folder `path` of numbered PNGs.

    Returns the names of the written files. ValueError for bad frames, fps, crf or format, OSError where the disk is
    full or the folder not writable; in both cases no file is left.
    """
    if form not in FORMATS:
        raise ValueError(f"format = {form!r} was given; allowed are {', '.join(FORMATS)}.")
    frames = frames_uint8(videos)
    if form == "png frames":
        digits = max(4, len(str(len(videos))))
        return write_folder(path, ((f"frame_{i:0{digits}}.png", encode_png(frame, tags))
                                   for i, frame in enumerate(frames, 1)))
    write_file(path, encode_gif(frames, fps) if form == "gif" else encode_mp4(frames, fps, crf, tags, audio))
    return [Path(path).name]
