"""A complete training run: stages, validation, samples, curves and checkpoints around the loop in `fit`."""
from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..common.images import check_size
from ..common.saving import holding, write_file
from .config import TrainConfig
from .curves import draw_curves, read_curves
from .data.clips import Clips
from .data.sheet import draw_sheet
from .encoding import Batches, Encoded, resized
from .families.base import Family
from .families.registry import checkpoint_blocks
from .logs import append_line, write_whole
from .loop import fit
from .parallel import OneProcess
from .trackers import Track, open_trackers

SETTINGS = "settings.json"
SAMPLES = 4         # clips per sheet
LIVE_POINTS = 300   # points of the loss curve shown during training
# Settings that may change on resume; all others determine the training path.
FREE = {"resume", "output", "save_every", "sample_every", "checkpoint_every", "wandb", "tensorboard", "num_workers",
        "device", "steps", "num_epochs", "learning_rate", "ema_decay", "gradient_checkpointing"}


@dataclass
class Progress:
    """The state of a training run that is displayed live."""

    step: int
    steps: int
    loss: float
    seconds: float                            # since the start, excluding pauses
    draw: Callable[[str], Image.Image]

    @property
    def text(self) -> str:
        left = self.seconds / self.step * (self.steps - self.step)
        return f"step {self.step} of {self.steps}, loss {self.loss:.4f}, {duration(left)} left"

    def picture(self) -> Image.Image:
        """Loss curve with the latest samples below it."""
        return self.draw(self.text)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


@dataclass
class Training:
    """One training run. `result` is the output file; state, logs, samples and further checkpoints are stored beside it
    in a folder of the same name, or in `folder`. `on_progress` is called after every step and may raise to stop."""

    family: Family
    dataset: Dataset
    settings: TrainConfig
    result: Path
    folder: Path
    processes: OneProcess = field(default_factory=OneProcess)
    on_progress: Callable[[Progress], None] = lambda progress: None

    def run(self) -> None:
        """Train from the start or resume (`resume`); returns when `result` is written.

        Raises ValueError for settings that do not fit the data or an earlier run, FloatingPointError for a loss that is
        repeatedly NaN or infinite, OSError if the disk is full.
        """
        held = min(self.settings.validation_clips, len(self.dataset) // 10)
        self.train_clips, self.held_clips = range(len(self.dataset) - held), range(len(self.dataset) - held,
                                                                                   len(self.dataset))
        a_step = self.settings.batch_size * self.settings.accumulation * self.processes.count
        steps = self.settings.steps or math.ceil(self.settings.num_epochs * len(self.train_clips) / a_step)
        stages = self.settings.stage_list(steps)
        self.steps, self.done = sum(count for _, count in stages), 0
        self.trackers: list[Track] = []
        if isinstance(self.dataset, Clips):
            for (height, width), _ in stages:
                check_size(width, height, self.family.side_multiple)
        if self.processes.rank > 0:
            self._train(stages)
            return
        self._check_folder()
        with holding(self.folder, "The folder of the run"):
            self._open_folder()
            self._train(stages)

    def _train(self, stages: list[tuple[tuple[int, int], int]]) -> None:
        if self.settings.gradient_checkpointing:
            checkpoint_blocks(self.family.net, self.family.blocks)
        net = self.family.net.to(self.processes.device).train()
        logging.info("Training %.1f million weights on %d clips, %d for validation, %d steps on %s.",
                     sum(p.numel() for p in net.parameters() if p.requires_grad) / 1e6, len(self.train_clips),
                     len(self.held_clips), self.steps, self.processes.device)
        for number, (size, count) in enumerate(stages, start=1):
            net = self._stage(number, net, size, count)
            self.done += count
        if self.processes.rank == 0:
            self._export(self.result, net, self.done)

    def _check_folder(self) -> None:
        """Raise ValueError if the folder belongs to another run, or if there is no run to resume."""
        saved = self.folder / SETTINGS
        if saved.exists() and not self.settings.resume:
            raise ValueError(f"{self.folder} holds a run already: go on with it (resume), or choose another name.")
        if self.settings.resume and not saved.exists():
            raise ValueError(f"There is no run to go on with in {self.folder}: leave resume away, or give its name.")

    def _open_folder(self) -> None:
        """Create the folder, or check that the run in it is resumed with its own settings."""
        saved, given = self.folder / SETTINGS, asdict(self.settings)
        if saved.exists():
            before = self._settings_before(saved)
            others = [f"{name} {before[name]!r}, now {value!r}" for name, value in given.items()
                      if name not in FREE and before[name] != value]
            if others:
                raise ValueError(f"The run in {self.folder} was started with other settings: {'; '.join(others)}. Go "
                                 "on with those, or begin anew under another name.")
        self.result.parent.mkdir(parents=True, exist_ok=True)
        write_file(saved, json.dumps(given, indent=1).encode())
        self.live, self.sheet, self.loss = list(read_curves(self.folder).loss), None, math.nan
        self.trackers = open_trackers(self.settings, self.folder)

    def _settings_before(self, saved: Path) -> dict:
        """Settings of the run being resumed. Settings that an older release did not have get their defaults."""
        try:
            found = json.loads(saved.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            logging.warning("%s is empty or damaged: the run goes on with the settings that are given now, unchecked.",
                            saved)
            return asdict(self.settings)
        return {**asdict(TrainConfig()), **found}

    def _stage(self, number: int, net: nn.Module, size: tuple[int, int], steps: int) -> nn.Module:
        """Train at one resolution; returns the EMA of the weights."""
        settings, processes = self.settings, self.processes

        def encode(item: dict) -> Encoded:
            if "video" in item:
                item = {**item, "video": resized(item["video"], size)}
            elif settings.stages:
                raise ValueError("stages change the size of clips, and this data set holds finished latents: train in "
                                 "one stage, or from the clips themselves.")
            return self.family.encode(item)

        batches = Batches(self.dataset, self.train_clips, encode, size=settings.batch_size, seed=settings.seed,
                          workers=settings.num_workers, stride=processes.count)
        if processes.rank == 0:
            self.validation = self._validation(encode)
            self.shown = {name: value[:SAMPLES] for name, value in (self.validation or [batches(0)])[0].items()}
        def loss_of(number: int, generator: torch.Generator) -> Tensor:
            return self.family.loss(net, to_device(batches(number), processes.device), generator,
                                    settings.caption_dropout)

        return fit(net, loss_of, steps=steps, lr=settings.learning_rate, checkpoint=self.folder / f"state_{number}.pt",
                   seed=settings.seed * 100 + number, warmup=min(settings.warmup, steps // 10),
                   ema_decay=settings.ema_decay, clip_norm=settings.clip_norm, save_every=settings.save_every,
                   on_save=self._on_save, accumulation=settings.accumulation, processes=processes,
                   on_step=self._on_step)

    def _validation(self, encode: Callable[[dict], Encoded]) -> list[Encoded]:
        """The held-out clips, encoded once."""
        if not self.held_clips:
            return []
        size = min(self.settings.batch_size, len(self.held_clips))
        batches = Batches(self.dataset, self.held_clips, encode, size=size, seed=0)
        return [batches(number) for number in range(batches.per_epoch)]

    def _on_step(self, step: int, losses: list[float], seconds: float, rate: float) -> None:
        step = self.done + step
        if losses:
            self.loss = losses[-1]
            before = step - len(losses)
            every = max(1, self.steps // LIVE_POINTS)
            self.live = [point for point in self.live if point[0] <= before]  # the run may have rolled back
            self.live += [(number, loss) for number, loss in enumerate(losses, before + 1)
                          if number % every == 0 or not self.live]
        self.on_progress(Progress(step, self.steps, self.loss, seconds, self._picture))

    def _picture(self, headline: str) -> Image.Image:
        plot = draw_curves(read_curves(self.folder)._replace(loss=self.live), headline)
        if self.sheet is None:
            return plot
        whole = Image.new("RGB", (max(plot.width, self.sheet.width), plot.height + self.sheet.height), "white")
        whole.paste(plot, (0, 0))
        whole.paste(self.sheet, (0, plot.height))
        return whole

    def _on_save(self, step: int, averaged: nn.Module, loss: float) -> None:
        """Evaluate the EMA weights, log the results, keep the best weights and a copy each `checkpoint_every` steps."""
        settings, step = self.settings, self.done + step
        entry = {"step": step, "loss": loss}
        if self.validation:
            entry["validation"] = self._validation_loss(averaged)
        if step % settings.sample_every < settings.save_every or step == self.steps:
            entry |= self._sample(step, averaged)
        score = entry.get("validation", loss)
        curves = read_curves(self.folder)
        append_line(self.folder / "metrics.jsonl", entry)
        if score <= min((value for _, value in (curves.validation if self.validation else curves.loss)),
                        default=score):
            self._export(self.folder / "best.safetensors", averaged, step)
        if step % settings.checkpoint_every < settings.save_every and step >= settings.checkpoint_every:
            self._export(self.folder / f"step_{step:07}.safetensors", averaged, step)
        plot = draw_curves(read_curves(self.folder), f"{self.result.stem}: step {step} of {self.steps}")
        write_whole(self.folder / "curves.png", lambda path: plot.save(path, "PNG"))
        numbers = {name: value for name, value in entry.items() if name != "step"}
        for track in self.trackers:
            track(step, numbers)
        logging.info("%s: %s", self.result.stem, ", ".join(f"{name} {value:.4g}" for name, value in entry.items()))

    @torch.no_grad()
    def _validation_loss(self, net: nn.Module) -> float:
        losses = [self.family.loss(net, to_device(batch, self.processes.device),
                                   torch.Generator().manual_seed(number), 0.0).item()
                  for number, batch in enumerate(self.validation)]
        return sum(losses) / len(losses)

    def _sample(self, step: int, net: nn.Module) -> dict[str, float]:
        """Write a sheet of samples. Returns {"psnr": dB} of the generated frames against the clips after a VAE round
        trip, or {} if all frames were given."""
        batch = to_device(self.shown, self.processes.device)
        truth = self.family.truth(batch)
        truth = None if truth is None else self.family.encoders.pixels(truth)
        rows = []
        for name, (latent, given) in self.family.sample(net, batch, seed=self.settings.seed).items():
            made = self.family.encoders.pixels(latent)
            rows += [(name, clip) for clip in made]
        rows += [("the clip itself", clip) for clip in truth] if truth is not None else []
        self.sheet = draw_sheet(rows)
        (self.folder / "samples").mkdir(exist_ok=True)
        write_whole(self.folder / "samples" / f"step_{step:07}.png", lambda path: self.sheet.save(path, "PNG"))
        if truth is None:
            return {}
        first = given * truth.shape[1] // latent.shape[2]
        if first == truth.shape[1]:
            return {}
        error = (made[:, first:] - truth[:, first:]).square().mean().item()
        return {"psnr": -10 * math.log10(max(error, 1e-10))}

    def _export(self, path: Path, net: nn.Module, step: int) -> None:
        about = {"settings": asdict(replace(self.settings, resume=False)), "step": step, "steps": self.steps,
                 "clips": len(self.train_clips), "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        write_whole(path, lambda unfinished: self.family.export(unfinished, net,
                                                                {"stillmotion.training": json.dumps(about)}))


def to_device(batch: Encoded, device: torch.device) -> Encoded:
    return {name: value.to(device) for name, value in batch.items()}
