"""Prompts alone, for training on a model's own videos."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset


class Prompts(Dataset):
    """Items {"caption", "name", "frames", "size"}: what to make, without a clip to look at.

    frames: video frames, size: (height, width) in pixels. ValueError if there is no prompt.
    """

    def __init__(self, prompts: Sequence[str], frames: int, size: tuple[int, int], *, max_samples: int | None = None):
        self.prompts = [line.strip() for line in prompts if line.strip()][:max_samples]
        self.frames, self.size = frames, size
        if not self.prompts:
            raise ValueError("There is no prompt: give one a line.")

    @classmethod
    def read(cls, file: Path, frames: int, size: tuple[int, int], *, max_samples: int | None = None) -> Prompts:
        """A text file with one prompt a line. ValueError for a file that is no text."""
        try:
            return cls(file.read_text(encoding="utf-8").splitlines(), frames, size, max_samples=max_samples)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no text file in UTF-8: give one with a prompt a line.") from error

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no prompt {index} among {len(self)}")
        return {"caption": self.prompts[index], "name": f"prompt_{index:05}", "frames": self.frames, "size": self.size}

    def summary(self) -> str:
        return f"{len(self)} prompts for videos of {self.frames} frames, {self.size[1]}x{self.size[0]}"
