"""Stores finished blocks on disk, so that an interrupted run can resume from them with bit-identical results."""
from __future__ import annotations

import json
import logging
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from ..common.saving import saving, write_file
from .fingerprint import Fingerprint, digest

log = logging.getLogger(__name__)

ENTRY = "stillmotion.block"  # in the header of a block's file


class BlockFolder:
    """The blocks of one run, one .safetensors file each: the sampler's latent, and in the header what produced it.

    Opening it raises ValueError if its blocks are damaged or belong to another run, naming what differs, and
    OSError if it is not writable.
    """

    def __init__(self, path: Path, fingerprint: Fingerprint):
        self.path, self.fingerprint = path, fingerprint
        with saving(path):
            path.mkdir(parents=True, exist_ok=True)
        self.found = {index for index in range(len(fingerprint.blocks)) if self.file(index).exists()}
        self._check()
        if self.found:
            log.info("%s: %d of %d blocks are finished already.", path, len(self.found), len(fingerprint.blocks))

    @property
    def fingerprint(self) -> Fingerprint:
        """May be replaced by one whose blocks differ after the stored ones."""
        return self._fingerprint

    @fingerprint.setter
    def fingerprint(self, fingerprint: Fingerprint) -> None:
        self._fingerprint, self.histories = fingerprint, fingerprint.histories()

    def file(self, index: int) -> Path:
        return self.path / f"block_{index:06}.safetensors"

    def recall(self, index: int) -> Tensor | None:
        """Latent of a finished block on the CPU, or None."""
        return self._read(index)[0] if index in self.found else None

    def holds_from(self, index: int) -> bool:
        """Whether this block or a later one is stored."""
        return max(self.found, default=-1) >= index

    def keep(self, index: int, latent_BCFHW: Tensor) -> None:
        """Store a finished block unless it already exists."""
        if index in self.found:
            return
        latent_BCFHW = latent_BCFHW.cpu().contiguous()
        entry = {"settings": self.fingerprint.settings, "block": self.fingerprint.blocks[index],
                 "history": self.histories[index], "data": digest(latent_BCFHW)}
        write_file(self.file(index), safetensors.torch.save({"latent": latent_BCFHW}, {ENTRY: json.dumps(entry)}))
        self.found.add(index)

    def _read(self, index: int) -> tuple[Tensor, dict]:
        """(latent, entry); raises ValueError for a corrupt file."""
        try:
            with safetensors.safe_open(self.file(index), framework="pt", device="cpu") as file:
                latent, entry = file.get_tensor("latent"), json.loads(file.metadata()[ENTRY])
                written = entry["data"]
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a whole block file, {error}") from error
        if digest(latent) != written:
            raise ValueError("its numbers are not those that were written")
        return latent, entry

    def _check(self) -> None:
        damaged = []
        for index in sorted(self.found):
            try:
                _, entry = self._read(index)
            except ValueError as error:
                damaged.append(f"{self.file(index).name} ({error})")
                continue
            if entry["history"] != self.histories[index]:
                raise ValueError(f"The resume folder {self.path} holds blocks of another run. "
                                 f"{self._difference(index, entry)}")
        if damaged:
            raise ValueError(f"Damaged blocks in the resume folder {self.path}: {'; '.join(damaged)}. Delete these "
                             "files and queue again: they are made anew, the others are kept.")

    def _difference(self, index: int, entry: dict) -> str:
        """How the stored block `index` differs from what this run would generate, and what to do."""
        settings = changes(entry["settings"], self.fingerprint.settings)
        if settings:
            return f"{settings}. Set it back to go on with that run, or name another folder to begin anew."
        block = changes(entry["block"], self.fingerprint.blocks[index]) or "an earlier block, whose file is missing"
        return (f"Of block {index}: {block}. Set it back to go on with that run, delete {self.file(index).name} and "
                "the files after it to make these blocks anew, or name another folder.")


def changes(stored: dict, now: dict) -> str:
    """The entries that differ, with both values."""
    stored, now = json.loads(json.dumps(stored)), json.loads(json.dumps(now))
    return "; ".join(f"{key} was {stored.get(key)}, now it is {now.get(key)}" for key in sorted({*stored, *now})
                     if stored.get(key) != now.get(key))
