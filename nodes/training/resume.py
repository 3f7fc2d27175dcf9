"""The settings of a run in its folder: read to resume it, compared with those given again."""
from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

from ..common.saving import write_file
from .config import TrainConfig

log = logging.getLogger(__name__)

SETTINGS = "settings.json"
# Settings that make another network or other data of a run. They cannot change; the others can.
FIXED = ("family", "objective", "teacher", "fake_score", "fake_lora", "checkpoint", "from_scratch", "init_2d", "train",
         "lora_rank", "lora_targets", "encoders", "vae", "clip", "clip_type", "clip_vision", "space", "data_dir",
         "dataset", "network", "max_samples", "num_frames", "frame_size", "stages", "validation_clips",
         "model_channels", "channel_mult", "num_res_blocks", "schedule", "prediction", "seed",
         "mixed_precision", "optimizer")
SILENT = ("resume", "output")  # they differ by nature


def saved_settings(folder: Path) -> dict:
    """Settings of the run in `folder`; those that an older release did not have are missing. {} if there is no run, or
    with a warning if the file is damaged."""
    path = folder / SETTINGS
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        log.warning("%s is empty or damaged: the run goes on with the settings that are given now, unchecked.", path)
        return {}
    return found


def check_folder(folder: Path, resume: bool) -> None:
    """Raise ValueError if the folder belongs to another run, or if there is no run to resume."""
    there = (folder / SETTINGS).exists()
    if there and not resume:
        raise ValueError(f"{folder} holds a run already: go on with it (resume), or choose another name.")
    if resume and not there:
        raise ValueError(f"There is no run to go on with in {folder}: leave resume away, or give its name.")


def keep_settings(folder: Path, settings: TrainConfig) -> None:
    """Write the settings into the folder; the run in it may be resumed with others only where that makes sense.

    Raises ValueError that names the settings which cannot change.
    """
    before, given = saved_settings(folder), asdict(settings)
    fixed = (*FIXED, "block") if settings.family == "causal_wan" else FIXED
    if before:
        before = {**asdict(TrainConfig()), **before}
        changed = {name: f"{name} {before[name]!r}, now {value!r}" for name, value in given.items()
                   if before[name] != value and name not in SILENT}
        others = [text for name, text in changed.items() if name in fixed]
        if others:
            raise ValueError(f"The run in {folder} was started with other settings: {'; '.join(others)}. Go on with "
                             "those, or begin anew under another name.")
        if changed:
            log.info("Settings changed since the start: %s.", "; ".join(changed.values()))
    write_file(folder / SETTINGS, json.dumps(given, indent=1).encode())
