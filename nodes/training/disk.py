"""Encoded clips and captions on disk: encoded once, whatever the number of epochs, processes and resumed runs."""
from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..common.saving import replacing

Encoded = dict[str, Tensor]


class DiskCache:
    """One .safetensors file for each key in `folder`; `source` names what made them, so that another never reads
    them."""

    def __init__(self, folder: Path, source: str = ""):
        self.folder, self.source = folder, source

    def _path(self, key: str) -> Path:
        return self.folder / f"{sha256(f'{self.source}/{key}'.encode()).hexdigest()[:32]}.safetensors"

    def get(self, key: str) -> Encoded | None:
        """The tensors of `key`; None if there is no file of it, or a damaged one."""
        path = self._path(key)
        try:
            return load_file(path) if path.exists() else None
        except SafetensorError:
            return None

    def put(self, key: str, tensors: Encoded) -> None:
        with replacing(self._path(key)) as unfinished:
            save_file({name: value.contiguous() for name, value in tensors.items()}, unfinished)
