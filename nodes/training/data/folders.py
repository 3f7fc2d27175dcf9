"""Clips on disk: videos/ and captions/ of the same names, read lazily; and Moving Shapes written as such a folder."""
from __future__ import annotations

import logging
import shutil
from collections import Counter
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import NamedTuple

from torch import Tensor

from ...common.video import encode_mp4, hearing_cancel
from . import shapes as data
from .clips import Clips, MovingShapes
from .frames import count_frames, fit_frames, frames_needed, iterate_frames, pick_frames, read_frames

log = logging.getLogger(__name__)

PROBLEMS = ("skip", "refuse")
SIZES = ("any", "same")
SHOWN = 20  # skipped clips named in a summary


class Clip(NamedTuple):
    path: Path
    caption: str
    frames: int


class VideoFolder(Clips):
    """`folder`/videos and `folder`/captions: a clip and its caption have the same name, the caption's ending in .txt.

    A clip is any file that PyAV reads, or a folder of numbered images; a single image is a clip of one frame. Clips
    give `frames` frames of `size` (height, width): evenly over the clip with stride 0, else every `stride`-th from a
    place drawn anew in each epoch; resized and cropped at the middle.

    problems: what becomes of a clip that is damaged, too short, without a caption or (sizes "same") of another size
    than most: "skip" leaves it out and names it in `skipped` and `summary()`, "refuse" raises ValueError with all of
    them. A clip that turns out damaged only when it is read is replaced by the next one, with a warning, or refused.
    max_samples: only the first good ones in the order of their names.
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
        self.skipped: list[tuple[str, str]] = []  # (name, reason)
        self.clips: list[Clip] = []
        self._scan(same=sizes == "same", most=max_samples)
        if problems == "refuse" and self.skipped:
            raise ValueError(f"{self.folder}: {self._problems()}\nMend or remove them, or choose to skip them.")
        if not self.clips:
            raise ValueError(f"{self.folder} has no clip to train on. {self._problems()}".rstrip())
        if self.skipped:
            log.warning("%s: %s", self.folder, self._problems())

    def _scan(self, same: bool, most: int | None) -> None:
        sizes = {}
        paths = sorted(path for path in (self.folder / "videos").iterdir() if not path.name.startswith("."))
        for path in hearing_cancel(paths):
            try:
                caption, count = self._caption(path), count_frames(path)
                needed = frames_needed(self.frames, self.stride)
                if count < needed:
                    raise ValueError(f"too short, it has {count} of the {needed} frames needed")
                sizes[path] = tuple(read_frames(path, [0]).shape[1:3])
                self.clips.append(Clip(path, caption, count))
            except ValueError as error:
                self.skipped.append((path.name, str(error)))
            if most and len(self.clips) == most and not same:
                break
        if same and self.clips:
            usual, _ = Counter(sizes.values()).most_common(1)[0]
            self.skipped += [(path.name, f"{size[1]}x{size[0]} pixels, most are {usual[1]}x{usual[0]}")
                             for path, size in sizes.items() if size != usual]
            self.clips = [clip for clip in self.clips if sizes[clip.path] == usual][:most or None]
        names = {_stem(path) for path in paths}
        self.skipped += [(f"captions/{path.name}", "there is no video of this name")
                         for path in sorted((self.folder / "captions").glob("*.txt")) if path.stem not in names]

    def _caption(self, clip: Path) -> str:
        path = self.folder / "captions" / f"{_stem(clip)}.txt"
        if not path.is_file():
            raise ValueError(f"no caption, there is no captions/{path.name}")
        try:
            caption = " ".join(path.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise ValueError(f"captions/{path.name} is not UTF-8 text") from error
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
                frames_THWC = read_frames(clip.path, pick_frames(clip.frames, self.frames, self.stride, rng))
                return fit_frames(frames_THWC, self.size), clip.caption, clip.path.name
            except ValueError as error:
                if self.problems == "refuse":
                    raise ValueError(f"{clip.path}: {error}. Mend or remove it, or choose to skip such "
                                     "clips.") from error
                log.warning("%s: %s is replaced by the next clip: %s", self.folder, clip.path.name, error)
        raise ValueError(f"{self.folder}: not one of {len(self)} clips can be read any more.")

    def damaged(self) -> list[tuple[str, str]]:
        """(name, reason) of the clips whose frames cannot all be decoded; takes as long as playing them fast."""
        found = []
        for clip in self.clips:
            try:
                for _ in iterate_frames(clip.path, range(clip.frames)):
                    pass
            except ValueError as error:
                found.append((clip.path.name, str(error)))
        return found

    def contents(self) -> str:
        digest = sha256("\n".join(f"{clip.path.name} {clip.frames} {clip.caption}" for clip in self.clips).encode())
        return f"{super().contents()}, {digest.hexdigest()[:16]}"

    def summary(self) -> str:
        how = f"every {self.stride}. frame" if self.stride else "evenly in time"
        found = (f"{len(self)} clips from {self.folder.name}, {self.frames} frames ({how}) of "
                 f"{self.size[1]}x{self.size[0]}")
        return "\n".join(filter(None, (found, self._problems())))


def _stem(clip: Path) -> str:
    return clip.name if clip.is_dir() else clip.stem


def write_shapes(shapes: MovingShapes, folder: str | Path) -> None:
    """Write Moving Shapes as videos/*.mp4 and captions/*.txt into a new folder, all or nothing.

    ValueError if the folder is there already.
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
