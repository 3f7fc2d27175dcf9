"""Batches for training from the clips of a data set: clips that do not change are encoded only once.

Tensor names end in their layout: B batch, T frames, C channels, H height, W width, L text tokens, N vision tokens.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..common.clip import encode_tokens
from ..common.vae import fold_frames
from .data.clips import Clips
from .disk import DiskCache, Encoded

CACHE_BYTES = 2 * 2 ** 30  # memory for encodings of clips, and as much for captions; the rest is read again from disk


def as_node(function: Callable[..., Tensor], *arguments) -> Tensor:
    """Call one of the host's models in inference mode, as nodes do; returns a CPU tensor that autograd accepts."""
    with torch.inference_mode():
        result = function(*arguments)
    return result.float().cpu().clone()


@dataclass
class Encoders:
    """The host's models. vae None: clips stay in pixels. clip_vision None: for networks without image tokens.

    A caption is encoded once: its tokens stay in memory and, with a `disk`, in a file.
    """

    vae: Any
    clip: Any
    clip_vision: Any
    disk: DiskCache | None = None
    texts: dict[str, Tensor] = field(default_factory=dict)
    text_bytes: int = 0

    def latent(self, video_CTHW: Tensor) -> Tensor:
        """Posterior mean [C, T, h, w], unscaled, of a clip in -1..1; without a VAE the clip itself."""
        if self.vae is None:
            return video_CTHW
        return as_node(fold_frames(self.vae).encode, (video_CTHW.permute(1, 2, 3, 0) + 1) / 2)[0]

    def pixels(self, latent_BCTHW: Tensor) -> Tensor:
        """Decoded clips [B, T, H, W, 3] in 0..1."""
        if self.vae is None:
            return (latent_BCTHW.float().cpu().movedim(1, -1) / 2 + 0.5).clamp(0, 1)
        return as_node(fold_frames(self.vae).decode, latent_BCTHW.cpu()).clamp(0, 1)

    def text(self, caption: str) -> Tensor:
        """Tokens [L, C], truncated to the length of the empty caption so that captions can be stacked."""
        if caption not in self.texts:
            tokens_LC = self._text(caption)
            if self.text_bytes + tokens_LC.nbytes > CACHE_BYTES:
                return tokens_LC
            self.texts[caption], self.text_bytes = tokens_LC, self.text_bytes + tokens_LC.nbytes
        return self.texts[caption]

    def _text(self, caption: str) -> Tensor:
        found = self.disk and self.disk.get(f"text/{caption}")
        if not found:
            tokens_LC = as_node(lambda: self.clip.encode_from_tokens(self.clip.tokenize(caption)))[0]
            found = {"text": tokens_LC[:len(self.text(""))] if caption else tokens_LC}
            if self.disk:
                self.disk.put(f"text/{caption}", found)
        return found["text"]

    def image_tokens(self, image_CHW: Tensor) -> Tensor:
        """Vision tokens [N, W] of an image in -1..1."""
        return as_node(encode_tokens, self.clip_vision, (image_CHW.movedim(0, -1)[None] + 1) / 2)[0]


def resized(video_CTHW: Tensor, size: tuple[int, int]) -> Tensor:
    """The clip resized to (height, width), for training stages at lower resolution."""
    if video_CTHW.shape[2:] == size:
        return video_CTHW
    return F.interpolate(video_CTHW.movedim(1, 0), size, mode="area").movedim(1, 0)


def varies(dataset: Dataset) -> bool:
    """Whether a clip may differ between epochs, so that its encoding cannot be cached."""
    return isinstance(dataset, Clips) and (
        dataset.mirror or getattr(dataset, "stride", 0) > 0 or dataset.augments())


@lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of `count` items, different in each epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_033 + epoch)).tolist()


class ClipCache:
    """Encoded clips of a data set on disk, without their text, which clips of one caption share: `text` encodes it."""

    def __init__(self, disk: DiskCache, dataset: Dataset, text: Callable[[str], Tensor]):
        self.disk, self.dataset, self.text = disk, dataset, text

    def get(self, index: int) -> Encoded | None:
        item = self.disk.get(self.dataset.key(index))
        if item and "caption" in item:
            item["text"] = self.text(bytes(item.pop("caption").tolist()).decode())
        return item

    def put(self, index: int, item: Encoded, caption: str) -> None:
        kept = {name: value for name, value in item.items() if name != "text"}
        if "text" in item:
            kept["caption"] = torch.tensor(list(caption.encode()), dtype=torch.uint8)
        self.disk.put(self.dataset.key(index), kept)


class Batches:
    """Encoded batches of the clips `indices` of a data set, by batch number: the same number gives the same batch.

    Every epoch visits each clip once, in its own order; its last batch is filled up from the start of that order.
    Batches are requested `stride` numbers apart (the number of processes), which lets `workers` prefetch. With a
    `cache` encodings are kept on disk too, and clips whose encodings it has are not read.
    """

    def __init__(self, dataset: Dataset, indices: Sequence[int], encode: Callable[[dict], Encoded], *, size: int,
                 seed: int, workers: int = 0, stride: int = 1, cache: ClipCache | None = None):
        self.dataset, self.indices, self.encode = dataset, indices, encode
        self.size, self.seed, self.workers, self.stride = size, seed, workers, stride
        self.per_epoch = -(-len(indices) // size)
        self.kept: dict[int, Encoded] = {}  # in memory
        fixed = not varies(dataset)
        self.cached_bytes, self.counted = 0 if fixed else CACHE_BYTES, set()
        self.disk = cache if fixed and hasattr(dataset, "key") else None
        self.position = self.end = 0  # reader state: the next batch to read, and the end of its epoch
        self.reader: Iterator[list[dict]] = iter(())

    def picks(self, number: int) -> list[int]:
        """The clip indices of a batch."""
        epoch, place = divmod(number, self.per_epoch)
        order = epoch_order(len(self.indices), self.seed, epoch)
        return [self.indices[order[i % len(order)]] for i in range(place * self.size, (place + 1) * self.size)]

    def __call__(self, number: int) -> Encoded:
        picks = self.picks(number)
        missing = set(picks) - self.kept.keys()
        found = self._stored(missing) if self.disk else {}
        if missing - found.keys():
            for index, item in self._read(number).items():
                if index in missing and index not in found:
                    found[index] = self.encode(item)
                    if self.disk:
                        self.disk.put(index, found[index], item["caption"])
        for index, item in found.items():
            self._keep(index, item)
        chosen = [found[index] if index in found else self.kept[index] for index in picks]
        return {name: torch.stack([item[name] for item in chosen]) for name in chosen[0]}

    def _stored(self, indices: set[int]) -> dict[int, Encoded]:
        found = {index: self.disk.get(index) for index in indices}
        return {index: item for index, item in found.items() if item}

    def _keep(self, index: int, item: Encoded) -> None:
        """Keep an item in memory if there is room. Captions that clips share are counted once."""
        new = {value.data_ptr(): value.nbytes for value in item.values() if value.data_ptr() not in self.counted}
        if self.cached_bytes + sum(new.values()) <= CACHE_BYTES:
            self.kept[index] = item
            self.counted |= new.keys()
            self.cached_bytes += sum(new.values())

    def _read(self, number: int) -> dict[int, dict]:
        """The items of a batch; prefetches what the following batches of the epoch need."""
        if number != self.position or number >= self.end:
            self.position, self.end = number, (number // self.per_epoch + 1) * self.per_epoch
            self.reader = self._read_epoch(number, self.end)
        self.position += self.stride
        return dict(zip(self.picks(number), next(self.reader)))

    def _read_epoch(self, first: int, end: int) -> Iterator[list[dict]]:
        if isinstance(self.dataset, Clips):
            with torch.inference_mode():  # the epoch is a tensor, perhaps created in inference mode
                self.dataset.set_epoch(first // self.per_epoch)
        batches = [self.picks(number) for number in range(first, end, self.stride)]
        yield from DataLoader(self.dataset, batch_sampler=batches, num_workers=self.workers, collate_fn=list)
