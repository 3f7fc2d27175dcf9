"""Clips on disk: videos/ and captions/ with matching names, read lazily; and Moving Shapes written as such a folder."""
from __future__ import annotations

import logging
import shutil
from collections import Counter
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import NamedTuple

from torch import Tensor

from ...common.pictures import PICTURES, LeftOut, list_folder, normal, read_prompt
from ...common.video import encode_mp4, hearing_cancel
from . import shapes as data
from .clips import Clips, MovingShapes
from .frames import Look, check_frames, frames_needed, look, pick_times, read_frames

log = logging.getLogger(__name__)

PROBLEMS = ("skip", "refuse")
SIZES = ("any", "same")
SHOWN = 20  # skipped clips listed in a summary


class Clip(NamedTuple):
    path: Path
    caption: str
    look: Look


class VideoFolder(Clips):
    """`folder`/videos and `folder`/captions: a caption has the same name as its clip, with the suffix .txt.

    A clip is any file that PyAV or Pillow reads, or a folder of numbered images; a single image is a clip of one frame.
    Each clip yields `frames` frames of `size` (height, width), resized and center-cropped. With stride 0 they are
    spread evenly over the clip; otherwise they are `stride` frames apart, from a start drawn anew in each epoch.

    problems: what to do with a clip that is damaged, too short, has no caption or (sizes "same") differs in size from
    most others. "skip" leaves it out and lists it in `skipped` and `summary()`; "refuse" raises ValueError that lists
    them all. A clip that turns out to be damaged only when it is read is replaced by the next one, with a warning, or
    refused. max_samples: use only the first valid clips, in order of name.
    """

    def __init__(self, folder: str | Path, frames: int = 16, size: tuple[int, int] = (64, 64), *, stride: int = 0,
                 problems: str = "skip", sizes: str = "any", max_samples: int | None = None, seed: int = 0,
                 mirror: bool = False, normalise: str = "-1..1"):
        super().__init__(seed=seed, mirror=mirror, normalise=normalise)
        for name, value, least in (("frames", frames, 1), ("height", size[0], 8), ("width", size[1], 8),
                                   ("stride", stride, 0), ("max_samples", max_samples or 1, 1)):
            if value < least:
                raise ValueError(f"{name} = {value} was given; allowed is {least} or more.")
        for name, value, allowed in (("problems", problems, PROBLEMS), ("sizes", sizes, SIZES)):
            if value not in allowed:
                raise ValueError(f"{name} = {value!r} was given; allowed are {', '.join(allowed)}.")
        self.folder, self.frames, self.size, self.stride, self.problems = Path(folder), frames, size, stride, problems
        if not (self.folder / "videos").is_dir():
            raise ValueError(f"{self.folder} has no folder videos in it. A data set is a folder with videos/ and "
                             "captions/: videos/cat.mp4 belongs to captions/cat.txt.")
        self.skipped: list[LeftOut] = []
        self.clips: list[Clip] = []
        self._scan(same=sizes == "same", most=max_samples)
        if problems == "refuse" and self.skipped:
            raise ValueError(f"{self.folder}: {self._problems()}\nMend or remove them, or choose to skip them.")
        if not self.clips:
            raise ValueError(f"{self.folder} has no clip to train on. {self._problems()}".rstrip())
        if self.skipped:
            log.warning("%s: %s", self.folder, self._problems())

    def _scan(self, same: bool, most: int | None) -> None:
        paths, unreadable = list_folder(self.folder / "videos")
        self.skipped += unreadable
        texts = self._texts()
        needed = frames_needed(self.frames, self.stride)
        for path in hearing_cancel(paths):
            try:
                caption, found = self._caption(path, texts), look(path)
                if len(found.times) < needed:
                    raise ValueError(f"too short, it has {len(found.times)} of the {needed} frames needed")
                self.clips.append(Clip(path, caption, found))
            except (ValueError, OSError) as error:
                self.skipped.append(LeftOut(path.name, str(error)))
            if path.is_dir():
                self.skipped += _no_pictures(path)
            if most and len(self.clips) == most and not same:
                break
        if same and self.clips:
            usual, _ = Counter(clip.look.size for clip in self.clips).most_common(1)[0]
            self.skipped += [LeftOut(clip.path.name, "{1}x{0} pixels, ".format(*clip.look.size)
                                     + "most are {1}x{0}".format(*usual))
                             for clip in self.clips if clip.look.size != usual]
            self.clips = [clip for clip in self.clips if clip.look.size == usual][:most or None]
        names = {normal(_stem(path)) for path in paths}
        self.skipped += [LeftOut(f"captions/{path.name}", "there is no video of this name")
                         for name, path in texts.items() if name not in names]

    def _texts(self) -> dict[str, Path]:
        """Captions by clip name; other files are added to `skipped`."""
        if not (self.folder / "captions").is_dir():
            return {}
        paths, others = list_folder(self.folder / "captions")
        texts = {normal(path.stem): path for path in paths if path.suffix.lower() == ".txt" and path.is_file()}
        others += [LeftOut(path.name, "not a .txt file") for path in paths if path not in texts.values()]
        self.skipped += [LeftOut(f"captions/{name}", reason) for name, reason in others]
        return texts

    def _caption(self, clip: Path, texts: dict[str, Path]) -> str:
        path = texts.get(normal(_stem(clip)))
        if path is None:
            raise ValueError(f"no caption, there is no captions/{_stem(clip)}.txt")
        caption = " ".join(read_prompt(path).split())
        if not caption:
            raise ValueError(f"no caption, captions/{path.name} is empty")
        return caption

    def _problems(self) -> str:
        if not self.skipped:
            return ""
        lines = [f"- {name}: {reason}" for name, reason in self.skipped[:SHOWN]]
        if len(self.skipped) > SHOWN:
            lines.append(f"- and {len(self.skipped) - SHOWN} more")
        word = "refused" if self.problems == "refuse" else "skipped"
        return "\n".join([f"{len(self.skipped)} {word}:", *lines])

    def __len__(self) -> int:
        return len(self.clips)

    def read(self, index: int, rng: Random) -> tuple[Tensor, str, str]:
        for step in range(len(self)):
            clip = self.clips[(index + step) % len(self)]
            try:
                times = pick_times(clip.look.times, self.frames, self.stride, rng)
                return read_frames(clip.path, clip.look, times, self.size), clip.caption, clip.path.name
            except (ValueError, OSError) as error:
                if self.problems == "refuse":
                    raise ValueError(f"{clip.path}: {error}. Mend or remove it, or choose to skip such "
                                     "clips.") from error
                log.warning("%s: %s is replaced by the next clip: %s", self.folder, clip.path.name, error)
        raise ValueError(f"{self.folder}: not one of {len(self)} clips can be read any more.")

    def damaged(self) -> list[LeftOut]:
        """Clips with frames that cannot be decoded. Decodes every clip, so it is slow."""
        found = []
        for clip in self.clips:
            try:
                check_frames(clip.path, clip.look)
            except (ValueError, OSError) as error:
                found.append(LeftOut(clip.path.name, str(error)))
        return found

    def key(self, index: int) -> str:
        clip = self.clips[index]
        state = clip.path.stat()
        condition = self.condition(clip.path.name).tolist() if self.additional_condition_dim else ()
        return "/".join(map(str, (type(self).__qualname__, clip.path.name, state.st_mtime_ns, state.st_size,
                                  self.frames, self.size, self.stride, condition, clip.caption)))

    def contents(self) -> str:
        lines = (f"{clip.path.name} {len(clip.look.times)} {clip.caption}" for clip in self.clips)
        return f"{super().contents()}, {sha256(chr(10).join(lines).encode()).hexdigest()[:16]}"

    def summary(self) -> str:
        how = f"every {self.stride}. frame" if self.stride else "evenly in time"
        found = (f"{len(self)} clips from {self.folder.name}, {self.frames} frames ({how}) of "
                 f"{self.size[1]}x{self.size[0]}")
        return "\n".join(filter(None, (found, self._problems())))


class TextVideoDataset(VideoFolder):
    """Base of own data sets of videos/ and captions/: override what differs. `rng` draws at random, and the same for a
    clip in the same epoch; draw from nothing else.
    """

    rng: Random

    def augment_text(self, text: str) -> str:
        """Override to reword a caption."""
        return text

    def augment_video(self, frames: Tensor) -> Tensor:
        """Override to change a clip [C, T, H, W] in -1..1; the shape stays the same."""
        return frames

    def augmented(self, video_CTHW: Tensor, caption: str, rng: Random) -> tuple[Tensor, str]:
        self.rng = rng
        caption = self.augment_text(caption)
        return self.augment_video(video_CTHW), caption

    def augments(self) -> bool:
        kind = type(self)
        return (kind.augment_text, kind.augment_video) != (TextVideoDataset.augment_text,
                                                           TextVideoDataset.augment_video)


def _stem(clip: Path) -> str:
    return clip.name if clip.is_dir() else clip.stem


def _no_pictures(clip: Path) -> list[LeftOut]:
    """Files in a folder of images that are not images."""
    paths, others = list_folder(clip)
    others += [LeftOut(path.name, f"no picture ({', '.join(PICTURES)})") for path in paths
               if path.suffix.lower() not in PICTURES or not path.is_file()]
    return [LeftOut(f"{clip.name}/{name}", reason) for name, reason in others]


def write_shapes(shapes: MovingShapes, folder: str | Path) -> None:
    """Write Moving Shapes as videos/*.mp4 and captions/*.txt into a new folder, all or nothing.

    ValueError if the folder already exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} is there already; give the name of a new folder.")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        for name in ("videos", "captions"):
            (part / name).mkdir(parents=True)
        for index in range(len(shapes)):
            clip, form = shapes.clip(index)
            frames = iter(data.draw_clip(clip, shapes.frames).numpy())
            (part / "videos" / f"shape_{index:05}.mp4").write_bytes(encode_mp4(frames, clip.fs, crf=4))
            (part / "captions" / f"shape_{index:05}.txt").write_text(clip.caption(form) + "\n", encoding="utf-8")
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
