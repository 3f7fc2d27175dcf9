"""Clips for training as torch data sets: the base class of all sources, and Moving Shapes.

An item is {"video": float32 [C, T, H, W] in -1..1, "caption": str, "name": str}. Its random draws depend only on the
seed, the index and the epoch, so items are the same for any number of workers.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import torch
from torch import Tensor
from torch.utils.data import Dataset

from . import shapes as data

NORMALISATIONS = ("-1..1", "imagenet")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB, for pixels in 0..1
SIDE = re.compile(r"\b(left|right)(?=(?:wards?|most|-hand(?:ed)?)?\b)", re.IGNORECASE)


def swap_sides(caption: str) -> str:
    """The caption of the mirrored clip: left and right swapped."""
    def other(match: re.Match) -> str:
        word = "right" if match[0].lower() == "left" else "left"
        return word.upper() if match[0].isupper() else word.capitalize() if match[0][0].isupper() else word

    return SIDE.sub(other, caption)


class Clips(Dataset):
    """Base class of clip data sets. Subclasses implement `__len__` and `read`, and may override `augment_*`.

    mirror: mirror half of the clips and swap left and right in their captions. normalise: "-1..1", or "imagenet"
    (ImageNet mean and standard deviation). Call `set_epoch` before each epoch for new random draws; it also reaches
    running workers.

    With an `additional_condition_dim` every item also has a "condition" [D], from `additional_condition`, for a network
    that takes it.
    """

    additional_condition_dim = 0

    def __init__(self, *, seed: int = 0, mirror: bool = False, normalise: str = "-1..1"):
        if normalise not in NORMALISATIONS:
            raise ValueError(f"normalise = {normalise!r} was given; allowed are {', '.join(NORMALISATIONS)}.")
        self.seed, self.mirror, self.normalise = seed, mirror, normalise
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def read(self, index: int, rng: Random) -> tuple[Tensor, str, str]:
        """(frames [T, H, W, 3] as bytes, or numbers in 0..255, caption, name) of one clip."""
        raise NotImplementedError

    def augment_text(self, caption: str, rng: Random) -> str:
        """Override to reword a caption."""
        return caption

    def augment_frames(self, video_CTHW: Tensor, rng: Random) -> Tensor:
        """Override to augment a clip in -1..1; the shape stays the same."""
        return video_CTHW

    def augmented(self, video_CTHW: Tensor, caption: str, rng: Random) -> tuple[Tensor, str]:
        caption = self.augment_text(caption, rng)
        return self.augment_frames(video_CTHW, rng), caption

    def augments(self) -> bool:
        """Whether clips or captions are changed at random."""
        return any(getattr(type(self), name) is not getattr(Clips, name) for name in ("augment_text", "augment_frames"))

    def additional_condition(self, name: str) -> Sequence[float]:
        """Override to give `additional_condition_dim` numbers for the clip of this name."""
        raise NotImplementedError

    def condition(self, name: str) -> Tensor:
        """[D]; ValueError for another number of values, or values that are not finite."""
        found = torch.as_tensor(self.additional_condition(name), dtype=torch.float32)
        if found.shape != (self.additional_condition_dim,) or not found.isfinite().all():
            raise ValueError(f"{type(self).__name__}.additional_condition gave {found.tolist()} for {name}: it must be "
                             f"{self.additional_condition_dim} finite numbers (additional_condition_dim).")
        return found

    def key(self, index: int) -> str:
        """Name of a clip's content: equal only for the same frames and caption, in later runs too."""
        return f"{type(self).__qualname__}/{self.contents()}/{index}"

    def summary(self) -> str:
        """One-line description of the data set, followed by what was skipped."""
        return f"{len(self)} clips"

    def contents(self) -> str:
        """Text that identifies the clips: equal only for the same clips."""
        return self.summary().splitlines()[0]

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no clip {index} among {len(self)}")
        rng = Random(f"{self.seed}/{int(self._epoch)}/{index}")
        frames_THWC, caption, name = self.read(index, rng)
        video = frames_THWC.permute(3, 0, 1, 2).float() / 127.5 - 1
        if self.mirror and rng.random() < 0.5:
            video, caption = video.flip(-1), swap_sides(caption)
        video, caption = self.augmented(video, caption, rng)
        if self.normalise == "imagenet":
            mean, std = (torch.tensor(values)[:, None, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
            video = ((video + 1) / 2 - mean) / std
        item = {"video": video.contiguous(), "caption": caption, "name": name}
        return item | ({"condition": self.condition(name)} if self.additional_condition_dim else {})


class MovingShapes(Clips):
    """`count` drawn clips of one moving shape each; with `held_out`, held-out combinations and caption templates.

    size: (height, width) in pixels; in a wide or tall one the shape moves in the square in its middle. frames: 1 to 32.
    """

    def __init__(self, count: int, frames: int = 16, size: tuple[int, int] = (64, 64), *, held_out: bool = False,
                 seed: int = 0, mirror: bool = False, normalise: str = "-1..1"):
        super().__init__(seed=seed, mirror=mirror, normalise=normalise)
        if count < 1:
            raise ValueError(f"count = {count} was given; give at least 1 clip.")
        if not 1 <= frames <= data.MAX_FRAMES:
            raise ValueError(f"frames = {frames} was given; Moving Shapes have 1 to {data.MAX_FRAMES} frames, because "
                             "the shape leaves the picture after that.")
        if min(size) < 16:
            raise ValueError(f"size = {size[1]}x{size[0]} was given; Moving Shapes have sides of 16 pixels or more.")
        self.count, self.frames, self.size, self.held_out = count, frames, size, held_out

    def __len__(self) -> int:
        return self.count

    def clip(self, index: int) -> tuple[data.ShapeClip, int]:
        """(clip, index of its caption template), the same in every epoch."""
        rng = Random(f"shapes/{self.seed}/{index}")
        edge = min(self.size)
        clip, scale = data.random_clip(rng, held_out=self.held_out), edge / 64
        form = data.HELD_OUT_FORM if self.held_out else rng.randrange(data.HELD_OUT_FORM)
        return replace(clip, x=clip.x * scale, y=clip.y * scale, radius=clip.radius * scale, size=edge), form

    def read(self, index: int, rng: Random) -> tuple[Tensor, str, str]:
        clip, form = self.clip(index)
        rows, columns = ((torch.arange(side) - (side - clip.size) // 2).clamp(0, clip.size - 1) for side in self.size)
        frames_THWC = data.draw_clip(clip, self.frames)[:, rows][:, :, columns]  # the background goes on to the sides
        return frames_THWC, clip.caption(form), f"shape_{index:05}"

    def summary(self) -> str:
        kept = "kept from training, " if self.held_out else ""
        return (f"{self.count} clips of moving shapes, {kept}{self.frames} frames of {self.size[1]}x{self.size[0]}, "
                f"seed {self.seed}")
