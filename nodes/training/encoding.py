"""Batches for training from the clips of a data set: clips that do not change are encoded only once.

Tensor names end in their layout: B batch, T frames, C channels, H height, W width, L text tokens, N vision tokens.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..common.clip import encode_tokens
from ..common.vae import fold_frames
from .data.clips import Clips

CACHE_BYTES = 2 * 2 ** 30  # memory for cached encodings of clips and captions; the rest is re-encoded in each epoch

Encoded = dict[str, Tensor]


def as_node(function: Callable[..., Tensor], *arguments) -> Tensor:
    """Call one of the host's models in inference mode, as nodes do; returns a CPU tensor that autograd accepts."""
    with torch.inference_mode():
        result = function(*arguments)
    return result.float().cpu().clone()


@dataclass(frozen=True)
class Encoders:
    """The host's models. vae None: clips stay in pixels. clip_vision None: for networks without image tokens."""

    vae: Any
    clip: Any
    clip_vision: Any

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
        tokens_LC = self._text(caption)
        return tokens_LC[:len(self._text(""))] if caption else tokens_LC

    def _text(self, caption: str) -> Tensor:
        return as_node(lambda: self.clip.encode_from_tokens(self.clip.tokenize(caption)))[0]

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
    kind = type(dataset)
    return isinstance(dataset, Clips) and (
        dataset.mirror or getattr(dataset, "stride", 0) > 0 or kind.augment_text is not Clips.augment_text
        or kind.augment_frames is not Clips.augment_frames)


@lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of `count` items, different in each epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_033 + epoch)).tolist()


class Batches:
    """Encoded batches of the clips `indices` of a data set, by batch number: the same number gives the same batch.

    Every epoch visits each clip once, in its own order; its last batch is filled up from the start of that order.
    Batches are requested `stride` numbers apart (the number of processes), which lets `workers` prefetch.
    """

    def __init__(self, dataset: Dataset, indices: Sequence[int], encode: Callable[[dict], Encoded], *, size: int,
                 seed: int, workers: int = 0, stride: int = 1):
        self.dataset, self.indices, self.encode = dataset, indices, encode
        self.size, self.seed, self.workers, self.stride = size, seed, workers, stride
        self.per_epoch = -(-len(indices) // size)
        self.cache: dict[int, Encoded] = {}
        self.cached_bytes = 0 if not varies(dataset) else CACHE_BYTES
        self.position = self.end = 0  # reader state: the next batch to read, and the end of its epoch
        self.reader: Iterator[list[dict]] = iter(())

    def picks(self, number: int) -> list[int]:
        """The clip indices of a batch."""
        epoch, place = divmod(number, self.per_epoch)
        order = epoch_order(len(self.indices), self.seed, epoch)
        return [self.indices[order[i % len(order)]] for i in range(place * self.size, (place + 1) * self.size)]

    def __call__(self, number: int) -> Encoded:
        picks = self.picks(number)
        missing = set(picks) - self.cache.keys()
        found = {index: self.encode(item) for index, item in self._read(number).items() if index in missing} \
            if missing else {}
        for index, item in found.items():
            nbytes = sum(value.nbytes for value in item.values())
            if self.cached_bytes + nbytes <= CACHE_BYTES:
                self.cache[index], self.cached_bytes = item, self.cached_bytes + nbytes
        chosen = [found[index] if index in found else self.cache[index] for index in picks]
        return {name: torch.stack([item[name] for item in chosen]) for name in chosen[0]}

    def _read(self, number: int) -> dict[int, dict]:
        """The items of a batch; prefetches what the following batches of the epoch need."""
        if not self.position <= number < self.end or (number - self.position) % self.stride:
            self.position, self.end = number, (number // self.per_epoch + 1) * self.per_epoch
            self.reader = self._read_epoch(number, self.end)
        while True:
            items, at = next(self.reader), self.position
            self.position += self.stride
            if at == number:
                return dict(zip(self.picks(number), items))

    def _read_epoch(self, first: int, end: int) -> Iterator[list[dict]]:
        if isinstance(self.dataset, Clips):
            with torch.inference_mode():  # the epoch is a tensor, perhaps created in inference mode
                self.dataset.set_epoch(first // self.per_epoch)
        batches = [self.picks(number) for number in range(first, end, self.stride)]
        yield from DataLoader(self.dataset, batch_sampler=batches, num_workers=self.workers, collate_fn=list)
