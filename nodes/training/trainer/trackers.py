"""Weights & Biases and TensorBoard: imported only where they are asked for, and never needing a key."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from .config import TrainConfig

Track = Callable[[int, dict[str, float]], None]


def open_trackers(settings: TrainConfig, folder: Path) -> list[Track]:
    """Functions that take a step and its numbers. Raises ImportError, with what to do, for a package not installed."""
    found: list[Track] = []
    if settings.wandb:
        _need("wandb")
        import wandb
        run = wandb.init(project="stillmotion", name=folder.name, dir=str(folder), config=asdict(settings),
                         mode=None if wandb.api.api_key else "offline")
        found.append(lambda step, numbers: run.log(numbers, step=step))
    if settings.tensorboard:
        _need("tensorboard")
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(str(folder / "tensorboard"))
        found.append(lambda step, numbers: [writer.add_scalar(name, value, step) for name, value in numbers.items()])
    return found


def _need(package: str) -> None:
    if find_spec(package) is None:
        raise ImportError(f"{package} was asked for and is not installed: pip install {package}, or leave it away "
                          f"(--no_{package}). The loss curve is written beside the result either way.")
