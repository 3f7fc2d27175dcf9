"""Frames to MP4, GIF and PNG."""
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .saving import replacing
from .values import shown

try:
    import comfy.model_management as management
except ImportError:  # the library's save_video, in a Python without ComfyUI
    management = None

FORMATS = ("mp4", "gif", "png frames")
BT709 = 1  # colour primaries and transfer in H.273; PyAV before 17 has no names for them
AAC_RATES = (7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
MAX_FPS = 240
MAX_GIF_FPS = 50  # GIF delays are in 1/100 s, and browsers slow anything under 2/100 s down to 10/100 s


def frames_uint8(images_NHWC: torch.Tensor) -> Iterator[np.ndarray]:
    """Yield frames [H,W,3] uint8 from images [N,H,W,3 or 4] in 0..1, clamped and rounded; alpha is dropped.

    Raises ValueError for a wrong shape, no frames, or NaN / infinite pixels (named by frame), before the first frame.
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


def hearing_cancel(items: Iterable) -> Iterator:
    """Yield the items, raising InterruptProcessingException before the next one if the run is cancelled."""
    for item in items:
        check_cancelled()
        yield item


def check_cancelled() -> None:
    """Raise InterruptProcessingException if the run is cancelled."""
    if management:
        management.throw_exception_if_processing_interrupted()


def frame_rate(fps: float | Fraction, form: str = "mp4") -> Fraction:
    """fps as an exact fraction that containers accept; ValueError outside the range that `form` supports."""
    highest = MAX_GIF_FPS if form == "gif" else MAX_FPS
    rate = Fraction(fps).limit_denominator(1001) if 0 < fps <= highest else 0  # NaN fails the comparison too
    if not rate:
        raise ValueError(f"fps = {float(fps):g} was given; {form} allows more than 0 and at most {highest}.")
    return rate


def pad_to_even(frame_HWC: np.ndarray) -> np.ndarray:
    """Repeat the last row or column if a side is odd: 4:2:0 chroma needs even sides."""
    height, width = frame_HWC.shape[:2]
    return np.pad(frame_HWC, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def encode_mp4(frames: Iterable[np.ndarray], fps: float | Fraction, crf: int = 16) -> bytes:
    """H.264 4:2:0 MP4 of frames [H,W,3] uint8, as `open_mp4` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        _write_mp4(Path(folder, "clip.mp4"), frames, fps, crf)
        return Path(folder, "clip.mp4").read_bytes()


def check_mp4(fps: float | Fraction, crf: int) -> None:
    """Raise ValueError for an fps or crf that MP4 encoding does not support."""
    frame_rate(fps)
    if not 1 <= crf <= 51:
        raise ValueError(f"crf = {crf} was given; allowed are 1 (best) to 51 (smallest file).")


@contextmanager
def open_mp4(path: Path, fps: float | Fraction, crf: int, tags: dict | None = None,
             audio: dict | None = None) -> Iterator[Callable]:
    """H.264 4:2:0 MP4 in the new file `path`: yields add(frame), which encodes one more frame [H,W,3] uint8.

    Odd sides are padded by one pixel, see pad_to_even. crf 1 (best) .. 51. tags: one container tag per key, values as
    JSON. audio: ComfyUI's AUDIO, truncated at the last frame. add raises InterruptProcessingException on cancel.
    """
    check_mp4(fps, crf)
    rate = frame_rate(fps)

    def read_again(url, flags, options):
        target.flush()
        return path.open("rb")

    # use_metadata_tags: without it the MP4 muxer drops every tag that is not in Apple's list. faststart: a second pass
    # moves the tags and the index to the front, because ComfyUI's frontend looks for them in the first 64 MB.
    with path.open("xb") as target, av.open(
            target, "w", format="mp4", options={"movflags": "use_metadata_tags+faststart"},
            io_open=read_again) as container:
        for key, value in (tags or {}).items():
            container.metadata[key] = json.dumps(value)
        stream = container.add_stream("libx264", rate=rate)
        # With B-frames, x264 occasionally produces different pixels from the same frames.
        stream.pix_fmt, stream.options = "yuv420p", {"crf": str(crf), "bf": "0"}
        # Players guess the colour matrix of untagged files from their size, and disagree: tag it as BT.709.
        codec = stream.codec_context
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries = codec.color_trc = BT709
        sound = Sound(container, audio) if has_sound(audio) else None
        count = 0

        def add(frame: np.ndarray) -> None:
            nonlocal count
            check_cancelled()
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
            sound.write(seconds=count / rate)


def _write_mp4(path: Path, frames: Iterable[np.ndarray], *settings) -> None:
    with open_mp4(path, *settings) as add:
        for frame in frames:
            add(frame)


def has_sound(audio: dict | None) -> bool:
    return audio is not None and audio["waveform"].numel() > 0


class Sound:
    """An AAC track: the first item of AUDIO (waveform [1,C,S] in -1..1), as mono or stereo.

    AAC supports few sample rates; audio at any other rate is resampled to the next higher one.
    """

    def __init__(self, container, audio: dict):
        self.container, self.given = container, int(audio["sample_rate"])
        if self.given < 1:
            raise ValueError(f"the sound has {self.given} samples a second; give it with its true sample rate.")
        self.rate = min((rate for rate in AAC_RATES if rate >= self.given), default=AAC_RATES[-1])
        self.wave_CS = torch.nan_to_num(audio["waveform"][0, :2].float().cpu()).clamp(-1, 1)
        self.stream = container.add_stream("aac", rate=self.rate)

    def write(self, seconds: Fraction) -> None:
        """Encode the audio up to `seconds`."""
        layout = "mono" if len(self.wave_CS) == 1 else "stereo"
        wave_CS = self.wave_CS[:, :max(1, int(seconds * self.given))].contiguous().numpy()
        sound = av.AudioFrame.from_ndarray(wave_CS, format="fltp", layout=layout)
        sound.sample_rate, sound.pts = self.given, 0
        resampler = av.AudioResampler("fltp", layout, self.rate)
        for part in [*resampler.resample(sound), *resampler.resample(None)] if self.given != self.rate else [sound]:
            self.container.mux(self.stream.encode(part))
        self.container.mux(self.stream.encode())


def encode_gif(frames: Iterable[np.ndarray], fps: float | Fraction) -> bytes:
    """Looping GIF of frames [H,W,3] uint8, with one palette for all frames so that static areas do not flicker."""
    rate = frame_rate(fps, "gif")
    pictures = [Image.fromarray(frame) for frame in hearing_cancel(frames)]
    # A few thousand pixels of each frame are enough to choose 256 colours; whole clips would be slow.
    step = max(1, pictures[0].width * pictures[0].height // 4096)
    pixels = np.concatenate([np.asarray(p).reshape(-1, 3)[::step] for p in pictures])
    palette = Image.fromarray(pixels[None]).quantize(256, Image.Quantize.MEDIANCUT)
    indexed = [p.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for p in hearing_cancel(pictures)]
    # Whole 1/100 s only: rounding the elapsed time, not each frame's duration, preserves the clip's length.
    ends = [round(100 * (i + 1) / rate) for i in range(len(indexed))]
    durations = [10 * (end - start) for start, end in zip([0, *ends], ends)]
    buffer = io.BytesIO()
    indexed[0].save(buffer, "GIF", save_all=True, append_images=hearing_cancel(indexed[1:]), duration=durations, loop=0,
                    disposal=1, optimize=False)
    return buffer.getvalue()


def encode_png(frame: np.ndarray, tags: dict | None = None) -> bytes:
    """One PNG of a frame [H,W,3] uint8; tags become text chunks, values as JSON, as ComfyUI's Save Image does."""
    info = PngInfo()
    for key, value in (tags or {}).items():
        info.add_text(key, json.dumps(value))
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG", pnginfo=info, compress_level=4)
    return buffer.getvalue()


def write_video(path: Path, images_NHWC: torch.Tensor, fps: float | Fraction, form: str, crf: int = 16,
                tags: dict | None = None, audio: dict | None = None) -> list[str]:
    """Write images [N,H,W,3] in 0..1 to the new file `path` (mp4, gif) or the new folder `path` (numbered PNGs,
    whose names are returned). Raises ValueError for invalid frames, fps or crf; OSError is passed through."""
    frames = frames_uint8(images_NHWC)
    if form == "png frames":
        path.mkdir()
        digits = max(4, len(str(len(images_NHWC))))
        names = [f"frame_{i:0{digits}}.png" for i in range(1, len(images_NHWC) + 1)]
        for name, frame in zip(names, hearing_cancel(frames)):
            (path / name).write_bytes(encode_png(frame, tags))
        return names
    if form == "gif":
        path.write_bytes(encode_gif(frames, fps))
    else:
        _write_mp4(path, frames, fps, crf, tags, audio)
    return []


def save_video(videos: torch.Tensor, path: str | Path, fps: float, form: str = "mp4", crf: int = 16,
               tags: dict | None = None, audio: dict | None = None) -> None:
    """Save frames [N,H,W,3] in 0..1 to the file `path`, overwriting an existing one, or to the new folder `path`.

    Raises ValueError for invalid frames, fps, crf or format, OSError if the disk is full or the folder not writable;
    in both cases nothing is left behind.
    """
    check_format(form)
    with replacing(Path(path)) as content:
        write_video(content, videos, fps, form, crf, tags, audio)


def check_format(form: str) -> None:
    if form not in FORMATS:
        raise ValueError(f"format = {shown(form)} was given; allowed are {', '.join(FORMATS)}.")
