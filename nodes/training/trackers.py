"""Weights & Biases and TensorBoard: imported only on request; no API key required."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ..common.extras import import_extra
from .config import TrainConfig

Track = Callable[[int, dict[str, float]], None]


def open_trackers(settings: TrainConfig, folder: Path) -> list[Track]:
    """Functions that take a step and its metrics. Raises ImportError, with what to do, if a package is missing."""
    found: list[Track] = []
    if settings.wandb:
        wandb = import_extra("wandb", "wandb", "Logging to Weights & Biases")
        run = wandb.init(project="stillmotion", name=folder.name, dir=str(folder), config=asdict(settings),
                         mode=None if wandb.api.api_key else "offline")
        found.append(lambda step, numbers: run.log(numbers, step=step))
    if settings.tensorboard:
        boards = import_extra("torch.utils.tensorboard", "tensorboard", "Logging to TensorBoard")
        writer = boards.SummaryWriter(str(folder / "tensorboard"))
        found.append(lambda step, numbers: [writer.add_scalar(name, value, step) for name, value in numbers.items()])
    return found

