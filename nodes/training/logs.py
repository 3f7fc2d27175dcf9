"""Files that a run writes beside its result: its state, and JSON Lines logs."""
from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..common.saving import replacing

STATE = ("net", "optimizer", "averaged", "step", "seconds")


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Atomic write: call `write` with a temporary path, then move the file to `path`. A failure leaves nothing behind.

    The OSError says what to do.
    """
    with replacing(path) as unfinished:
        try:
            write(unfinished)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, SafetensorError) as error:  # how torch and safetensors report a full disk
            free = shutil.disk_usage(path.parent).free // 2 ** 20
            raise OSError(errno.ENOSPC, f"{str(error).splitlines()[0]}; {free} MB of space are left there") from error
        with unfinished.open("r+b") as file:
            os.fsync(file.fileno())  # after a crash there is either the old file or the new one


def read_state(path: Path) -> dict | None:
    """State saved by `fit`, or None if there is none. ValueError for a damaged file."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises many exception types
        raise ValueError(f"{path} is cut off or damaged ({str(error).splitlines()[0] if str(error) else error!r}). "
                         "Begin anew under another name, from the last checkpoint of that folder.") from error
    missing = [name for name in STATE if name not in state] if isinstance(state, dict) else STATE
    if missing:
        raise ValueError(f"{path} holds no {', '.join(missing)}: it is of another kind. Begin anew under another name.")
    return state


def append_line(path: Path, entry: dict) -> None:
    """Append a line; if the previous line was cut off, terminate it first."""
    with path.open("a+b") as log:
        if log.tell():
            log.seek(-1, os.SEEK_END)
            if log.read() != b"\n":
                log.write(b"\n")
        log.write(json.dumps(entry).encode() + b"\n")


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of the lines; truncated or damaged lines are skipped."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found
