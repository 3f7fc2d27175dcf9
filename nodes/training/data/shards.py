"""Encoded clips in LMDB shards: prompt, latent and reference image, packed once and read lazily.

A packed folder holds shard_00000, shard_00001, ... (one LMDB environment each) and index.json, which is written last:
packing that was stopped goes on with the first shard that is missing, and is not taken for complete before.
An item is {"latent": float32 [C, T, h, w] as the VAE gives it, "reference": float32 [3, H, W] in -1..1, the first
frame, "caption": str, "name": str}.
"""
from __future__ import annotations

import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from threading import Lock

import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...common.extras import import_extra
from ...common.saving import write_file
from .clips import Clips

INDEX = "index.json"
VERSION = 1
_reading = Lock()


def import_lmdb():
    return import_extra("lmdb", "lmdb", "Reading or writing latent shards")


def pack(clips: Clips, folder: str | Path, encode: Callable[[Tensor], Tensor], vae: str, *, per_shard: int = 256,
         progress: Callable[[int, int], None] = lambda done, count: None) -> None:
    """Encode `clips` into `folder`, or go on where that was stopped.

    `encode` takes a clip [3, T, H, W] in -1..1 and gives its latent [C, T, h, w]; `vae` is the name of the encoder in
    the index. progress(done, count) is called after every clip. ValueError where the folder holds
    something else.
    """
    folder, lmdb = Path(folder), import_lmdb()
    if per_shard < 1:
        raise ValueError(f"per_shard = {per_shard} was given; give at least 1 clip.")
    if clips.normalise != "-1..1":
        raise ValueError(f"clips normalised as {clips.normalise} were given; a VAE takes them as -1..1.")
    plan = {"version": VERSION, "vae": vae, "clips": clips.contents(), "count": len(clips), "per_shard": per_shard}
    if folder.is_dir() and any(folder.iterdir()):
        _check_same(folder, plan)
    else:
        write_file(folder / "plan.json", json.dumps(plan).encode())
    shards = []
    for first in range(0, len(clips), per_shard):
        name, last = f"shard_{first // per_shard:05}", min(first + per_shard, len(clips))
        if not (folder / name).is_dir():
            rows = {}
            for index in range(first, last):
                rows |= _rows(index - first, clips[index], encode)
                progress(index + 1, len(clips))
            _write_shard(lmdb, folder / name, rows)
        shards.append({"name": name, "count": last - first, "bytes": (folder / name / "data.mdb").stat().st_size})
    write_file(folder / INDEX, json.dumps({**plan, "shards": shards}, indent=1).encode())
    (folder / "plan.json").unlink(missing_ok=True)


def _check_same(folder: Path, plan: dict) -> None:
    """What lies in the folder was packed from the same clips by the same VAE."""
    found = next((folder / name for name in (INDEX, "plan.json") if (folder / name).is_file()), None)
    if found is None:
        raise ValueError(f"{folder} holds other files; give the name of a new folder for the shards.")
    begun = json.loads(found.read_text(encoding="utf-8"))
    other = [f"{name} {begun.get(name)!r}, now {value!r}" for name, value in plan.items() if begun.get(name) != value]
    if other:
        raise ValueError(f"{folder} was begun with {'; '.join(other)}. Go on with the same, or give a new folder.")


def _rows(number: int, item: dict, encode: Callable[[Tensor], Tensor]) -> dict[bytes, bytes]:
    """The rows of one clip: what is text as JSON, what is numbers as .safetensors."""
    video_CTHW = item["video"]
    latent = encode(video_CTHW).float()
    if not torch.isfinite(latent).all() or latent.abs().max() > torch.finfo(torch.float16).max:
        raise ValueError(f"the latent of {item['name']} is not finite or beyond fp16; the VAE does not fit these "
                         "clips or is damaged.")
    reference = ((video_CTHW[:, 0] + 1) * 127.5).round().clamp(0, 255).byte()
    tensors = {"latent": latent.half().contiguous(), "reference": reference.contiguous()}
    text = {"caption": item["caption"], "name": item["name"]}
    return {b"tensors/%08d" % number: safetensors.torch.save(tensors), b"text/%08d" % number: json.dumps(text).encode()}


def _write_shard(lmdb, path: Path, rows: dict[bytes, bytes]) -> None:
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    # the size is the most a shard may take: rows fill whole pages of 4 KiB
    size = sum(len(value) + 8192 for value in rows.values()) + 2 ** 20
    with lmdb.open(str(part), map_size=size, subdir=True) as shard, shard.begin(write=True) as transaction:
        for key, value in rows.items():
            transaction.put(key, value)
    (part / "lock.mdb").unlink(missing_ok=True)
    os.replace(part, path)


def _read_rows(shard: Path, keys: list[bytes]) -> list[bytes | None]:
    # Opened for one clip at a time (half a millisecond): an open environment can neither be opened a second time in
    # the same process, by another data set of the same folder, nor live on in the workers that are forked from it.
    lmdb = import_lmdb()
    try:
        with _reading, lmdb.open(str(shard), readonly=True, lock=False, readahead=False, create=False) as environment:
            with environment.begin() as transaction:
                return [transaction.get(key) for key in keys]
    except lmdb.Error as error:
        raise ValueError(f"{shard} cannot be read ({error}); copy the folder again, or pack the clips "
                         "again.") from error


class LatentShards(Dataset):
    """Clips packed by `pack`; a shard is opened when a clip of it is read.

    ValueError for a folder that was not packed to its end or is damaged.
    """

    def __init__(self, folder: str | Path, *, max_samples: int | None = None):
        import_lmdb()
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            begun = (self.folder / "plan.json").is_file()
            raise ValueError(f"{self.folder} " + ("was not packed to its end: run the same command again to go on."
                             if begun else f"has no {INDEX}: it is no folder of packed latents. Make one with "
                                           "python workflows/data.py pack."))
        try:
            index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            self.vae, self.version, self.shards = index["vae"], index["version"], index["shards"]
            self._ends = list(accumulate(shard["count"] for shard in self.shards))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / INDEX} is damaged ({error}); pack the clips again.") from error
        if self.version != VERSION:
            raise ValueError(f"{self.folder} has format version {self.version}, this pack reads {VERSION}; pack the "
                             "clips again, or update the pack.")
        for shard in self.shards:  # a file that is cut off would end the process when it is read, so sizes come first
            data = self.folder / shard["name"] / "data.mdb"
            if not data.is_file() or data.stat().st_size != shard["bytes"]:
                raise ValueError(f"{data} is {'cut off or changed' if data.is_file() else 'missing'}; copy the folder "
                                 "again, or pack the clips again.")
        self.count = min(self._ends[-1], max_samples or self._ends[-1])

    def __len__(self) -> int:
        return self.count

    def summary(self) -> str:
        first = self[0]
        channels, frames, height, width = first["latent"].shape
        return (f"{len(self)} packed clips from {self.folder.name}, latents [{channels}, {frames}, {height}, {width}] "
                f"by {self.vae}, reference images {first['reference'].shape[2]}x{first['reference'].shape[1]}")

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no clip {index} among {len(self)}")
        shard = bisect_right(self._ends, index)
        name, number = self.shards[shard]["name"], index - (self._ends[shard - 1] if shard else 0)
        rows = _read_rows(self.folder / name, [b"tensors/%08d" % number, b"text/%08d" % number])
        if None in rows:
            raise ValueError(f"{self.folder / name} has no clip {number}, its index says it has; pack the clips again.")
        tensors, text = safetensors.torch.load(rows[0]), json.loads(rows[1])
        return {"latent": tensors["latent"].float(), "reference": tensors["reference"].float() / 127.5 - 1,
                "caption": text["caption"], "name": text["name"]}
