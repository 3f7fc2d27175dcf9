"""What is seen of a run while it trains: a line of progress, and the run's own log file."""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

LOG = "train.log"
LINE_EVERY = 30.0  # seconds between lines of progress in logs


@dataclass
class Progress:
    """The state of a training run that is displayed live."""

    step: int
    steps: int
    epoch: int                                # from 1
    loss: float
    rate: float                               # learning rate
    seconds: float                            # since the start, excluding pauses
    draw: Callable[[str], Image.Image]

    @property
    def text(self) -> str:
        left = self.seconds / self.step * (self.steps - self.step)
        return (f"step {self.step} of {self.steps}, epoch {self.epoch}, loss {self.loss:.4f}, learning rate "
                f"{self.rate:.2g}, {duration(left)} left")

    def picture(self) -> Image.Image:
        """Loss curve with the latest samples below it."""
        return self.draw(self.text)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


@contextmanager
def run_log(folder: Path) -> Iterator[None]:
    """What the trainer logs also goes to a file in the folder of the run, which later runs append to."""
    logger = logging.getLogger(__package__)
    handler = logging.FileHandler(folder / LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
