"""Encoded clips in LMDB shards: prompt, latent and reference image, packed once and read lazily.

A packed folder holds shard_00000, shard_00001, ... (one LMDB environment each) and index.json, which is written last:
interrupted packing resumes at the first missing shard, and a partial folder never counts as complete. Every record
starts with its checksum, and a shard is first verified in a separate process before it is read here.
An item is {"latent": float32 [C, T, h, w] as the VAE returns it, "reference": float32 [3, H, W] in -1..1, the first
frame, "caption": str, "name": str}.
"""
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from threading import Lock

import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...common import values
from ...common.extras import import_extra
from ...common.saving import write_file
from .clips import Clips

INDEX = "index.json"
VERSION = 2
READ = (1, 2)  # versions; version 1 has no checksums
NAME = re.compile(r"shard_\d{5,9}")
MOST_CLIPS = 10 ** 9
CHECK_SECONDS = 1800  # enough for a shard of many gigabytes on a slow disk
AGAIN = "copy the folder again, or pack the clips again"
_reading = Lock()


def import_lmdb():
    return import_extra("lmdb", "lmdb", "Reading or writing latent shards")


def pack(clips: Clips, folder: str | Path, encode: Callable[[Tensor], Tensor], vae: str, *, per_shard: int = 256,
         progress: Callable[[int, int], None] = lambda done, count: None) -> None:
    """Encode `clips` into `folder`, or resume an interrupted run.

    `encode` takes a clip [3, T, H, W] in -1..1 and returns its latent [C, T, h, w]; `vae` is the encoder's name in the
    index. progress(done, count) is called after every clip. ValueError if the folder holds something else.
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
    """Check that the folder's contents were packed from the same clips by the same VAE."""
    found = next((folder / name for name in (INDEX, "plan.json") if (folder / name).is_file()), None)
    if found is None:
        raise ValueError(f"{folder} holds other files; give the name of a new folder for the shards.")
    begun = json.loads(found.read_text(encoding="utf-8"))
    other = [f"{name} {begun.get(name)!r}, now {value!r}" for name, value in plan.items() if begun.get(name) != value]
    if other:
        raise ValueError(f"{folder} was begun with {'; '.join(other)}. Go on with the same, or give a new folder.")


def _rows(number: int, item: dict, encode: Callable[[Tensor], Tensor]) -> dict[bytes, bytes]:
    """The rows of one clip: text as JSON, tensors as .safetensors."""
    video_CTHW = item["video"]
    latent = encode(video_CTHW).float()
    if not torch.isfinite(latent).all() or latent.abs().max() > torch.finfo(torch.float16).max:
        raise ValueError(f"the latent of {item['name']} is not finite or beyond fp16; the VAE does not fit these "
                         "clips or is damaged.")
    reference = ((video_CTHW[:, 0] + 1) * 127.5).round().clamp(0, 255).byte()
    tensors = {"latent": latent.half().contiguous(), "reference": reference.contiguous()}
    text = {"caption": item["caption"], "name": item["name"]}
    from .check_shard import keys, sealed
    return dict(zip(keys(number), (sealed(safetensors.torch.save(tensors)), sealed(json.dumps(text).encode()))))


def _write_shard(lmdb, path: Path, rows: dict[bytes, bytes]) -> None:
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    # the map size is the maximum a shard may use: rows occupy whole pages of 4 KiB
    size = sum(len(value) + 8192 for value in rows.values()) + 2 ** 20
    with lmdb.open(str(part), map_size=size, subdir=True) as shard, shard.begin(write=True) as transaction:
        for key, value in rows.items():
            transaction.put(key, value)
    (part / "lock.mdb").unlink(missing_ok=True)
    os.replace(part, path)


def _read_rows(shard: Path, number: int, version: int) -> list[bytes]:
    # Opened for one clip at a time (half a millisecond). An open environment can neither be opened again in the same
    # process (by another data set of the same folder) nor survive in workers forked from it.
    lmdb = import_lmdb()
    from .check_shard import keys, read
    try:
        with _reading:
            return read(str(shard), keys(number), version)
    except (lmdb.Error, ValueError) as error:
        raise ValueError(f"{shard} cannot be read ({error}); {AGAIN}.") from error


def _check_shard(shard: Path, count: int, version: int) -> None:
    """Raise ValueError for a damaged shard, which could crash this process when read."""
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("check_shard.py")), str(shard), str(count),
                           str(version)], capture_output=True, text=True, errors="replace", timeout=CHECK_SECONDS)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] if done.returncode == 1 else ["reading it ended a process"]
        raise ValueError(f"{shard} cannot be read ({', '.join(why)}); {AGAIN}.")


class LatentShards(Dataset):
    """Clips packed by `pack`; a shard is opened when one of its clips is read.

    ValueError for a folder that is damaged or was not packed completely.
    """

    def __init__(self, folder: str | Path, *, max_samples: int | None = None):
        import_lmdb()
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            begun = (self.folder / "plan.json").is_file()
            raise ValueError(f"{self.folder} " + ("was not packed to its end: run the same command again to go on."
                             if begun else f"has no {INDEX}: it is no folder of packed latents. Make one with "
                                           "python workflows/data.py pack."))
        self._read_index()
        for name, _, size in self.shards:
            data = self.folder / name / "data.mdb"
            if not data.is_file() or data.stat().st_size != size:
                raise ValueError(f"{data} is {'cut off or changed' if data.is_file() else 'missing'}; {AGAIN}.")
        self._checked: dict[str, int] = {}  # shards verified in a separate process, with their modification time
        self.count = min(self._ends[-1], max_samples or self._ends[-1])

    def _read_index(self) -> None:
        source = str(self.folder / INDEX)
        try:
            index = values.parse_json((self.folder / INDEX).read_text(encoding="utf-8"), source)
            self.vae, shards = str(index.get("vae", "")), index.get("shards")
            self.version = values.whole(index.get("version"), "version")
            if self.version not in READ:
                raise ValueError(f"{self.folder} has format version {self.version}, this pack reads "
                                 f"{' and '.join(map(str, READ))}. Update the pack.")
            if not isinstance(shards, list) or not shards or not all(isinstance(shard, dict) for shard in shards):
                raise ValueError("shards is no list of shards.")
            self.shards = [(self._name(shard.get("name")),
                            values.whole(shard.get("count"), "count", high=MOST_CLIPS),
                            values.whole(shard.get("bytes"), "bytes", high=2 ** 62)) for shard in shards]
        except (UnicodeDecodeError, OSError) as error:
            raise ValueError(f"{source} is damaged ({error}); {AGAIN}.") from error
        except ValueError as error:
            raise ValueError(f"{source} is damaged, or was edited: {error} {AGAIN.capitalize()}.") from error
        self._ends = list(accumulate(count for _, count, _ in self.shards))

    @staticmethod
    def _name(name) -> str:
        """Validate a shard name, so that it stays inside the folder: only names that `pack` creates are valid."""
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"The name of a shard is {values.shown(name)}. It must be as shard_00000.")
        return name

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        """Name of a clip's content, for encodings made of it."""
        return f"{self.folder.resolve()}/{(self.folder / INDEX).stat().st_mtime_ns}/{index}"

    def summary(self) -> str:
        first = self[0]
        channels, frames, height, width = first["latent"].shape
        return (f"{len(self)} packed clips from {self.folder.name}, latents [{channels}, {frames}, {height}, {width}] "
                f"by {self.vae}, reference images {first['reference'].shape[2]}x{first['reference'].shape[1]}")

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no clip {index} among {len(self)}")
        shard = bisect_right(self._ends, index)
        (name, count, _), number = self.shards[shard], index - (self._ends[shard - 1] if shard else 0)
        changed = (self.folder / name / "data.mdb").stat().st_mtime_ns
        if self._checked.get(name) != changed:
            _check_shard(self.folder / name, count, self.version)
            self._checked[name] = changed
        tensors, text = _read_rows(self.folder / name, number, self.version)
        try:
            return _item(safetensors.torch.load(tensors), values.parse_json(text, "its text"))
        except (ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"{self.folder / name}, clip {number}: {error} {AGAIN.capitalize()}.") from error


def _item(tensors: dict[str, Tensor], text: dict) -> dict:
    latent, reference = tensors.get("latent"), tensors.get("reference")
    if latent is None or latent.ndim != 4 or not latent.is_floating_point() or not latent.numel():
        raise ValueError("there is no latent [C, T, h, w].")
    if reference is None or reference.ndim != 3 or reference.dtype != torch.uint8 or len(reference) != 3:
        raise ValueError("there is no reference image [3, H, W] in bytes.")
    if not all(isinstance(text.get(name), str) for name in ("caption", "name")):
        raise ValueError("there is no caption, or no name.")
    return {"latent": latent.float(), "reference": reference.float() / 127.5 - 1, "caption": text["caption"],
            "name": text["name"]}
