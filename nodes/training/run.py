"""A complete training run: stages, validation, samples, curves and checkpoints around the loop in `fit`."""
from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..common.drawing import stacked
from ..common.images import check_size
from ..common.saving import holding
from .average import halve_frozen, without_halves
from .config import TrainConfig
from .curves import draw_curves, read_curves
from .data.clips import Clips
from .data.prompts import Prompts
from .data.sheet import draw_sheet
from .disk import DiskCache
from .encoding import Batches, ClipCache, Encoded, resized
from .families.base import Family
from .families.registry import checkpoint_blocks
from .fidelity import check_vae
from .logs import append_line, write_whole
from .loop import fit
from .lora import save_adapters
from .memory import say_memory
from .parallel import HALVES, OneProcess
from .progress import LINE_EVERY, Progress, run_log
from .resume import check_folder, keep_settings
from .trackers import Track, open_trackers

log = logging.getLogger(__name__)

SAMPLES = 4         # clips per sheet
LIVE_POINTS = 300   # points of the loss curve shown during training
ENCODED = "encoded"  # folder of encodings in that of the run


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
    ranks: ClassVar[bool] = True   # whether the loss tells better weights from worse

    def run(self) -> None:
        """Train from the start or resume (`resume`); returns when `result` is written.

        Raises ValueError for settings that do not fit the data or an earlier run, FloatingPointError for a loss that is
        repeatedly NaN or infinite, OSError if the disk is full.
        """
        self.settings = replace(self.settings, **self.family.settled)
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
        if self.processes.rank == 0:
            check_folder(self.folder, self.settings.resume)
        if not self.settings.resume and not isinstance(self.dataset, Prompts):
            check_vae(self.dataset, self.family.encoders, self.settings.vae_psnr)
        if self.processes.rank > 0:
            self._train(stages)
            return
        with holding(self.folder, "The folder of the run"), run_log(self.folder):
            self._open_folder()
            self._train(stages)

    def _train(self, stages: list[tuple[tuple[int, int], int]]) -> None:
        if self.settings.gradient_checkpointing:
            checkpoint_blocks(self.family.net, self.family.blocks)
        if self.settings.mixed_precision != "no":
            halve_frozen(self.family.net, HALVES[self.settings.mixed_precision])
        net = self.family.net.to(self.processes.device).train()
        if self.processes.rank == 0:
            log.info("Training %.1f million weights on %d clips, %d for validation, %d steps on %s.",
                     sum(p.numel() for p in net.parameters() if p.requires_grad) / 1e6, len(self.train_clips),
                     len(self.held_clips), self.steps, self.processes.device)
            say_memory(net, self.settings.optimizer, self.settings.ema_decay > 0, self.processes.device)
        for number, (size, count) in enumerate(stages, start=1):
            net = self._stage(number, net, size, count)
            self.done += count
        if self.processes.rank == 0:
            self._export(self.result, net, self.done)

    def _open_folder(self) -> None:
        """Create the folder, or check that the run in it is resumed with settings that fit it."""
        self.result.parent.mkdir(parents=True, exist_ok=True)
        keep_settings(self.folder, self.settings)
        self.live, self.first, self.loss, self.said = list(read_curves(self.folder).loss), None, math.nan, -math.inf
        self.trackers = open_trackers(self.settings, self.folder)

    def _clip_cache(self, encode: Callable[[dict], Encoded], size: tuple[int, int]) -> ClipCache | None:
        """The encodings on disk that these encoders, this network and this size make; None where clips are not
        encoded but only copied."""
        encoders = self.family.encoders
        if encoders.vae is None:
            return None
        folder = self.folder / ENCODED
        words = encoders.text("a test of the text encoder")
        encoders.disk = DiskCache(folder, _digest({"text": words}))
        return ClipCache(DiskCache(folder, f"{type(self.family).__name__}/{size}/{_digest(encode(self.dataset[0]))}"),
                         self.dataset, encoders.text)

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

        cache = self._clip_cache(encode, size)
        batches = Batches(self.dataset, self.train_clips, encode, size=settings.batch_size, seed=settings.seed,
                          workers=settings.num_workers, stride=processes.count, cache=cache)
        self.batches_a_step, self.per_epoch = settings.accumulation * processes.count, batches.per_epoch
        if processes.rank == 0:
            held = Batches(self.dataset, self.held_clips or self.train_clips, encode, seed=0, cache=cache,
                           size=min(settings.batch_size, len(self.held_clips or self.train_clips)))
            self.validation = [held(number) for number in range(held.per_epoch)] if self.held_clips else []
            self.shown = {name: value[:SAMPLES] for name, value in held(0).items()}
            self.captions = [self.dataset[index]["caption"] for index in held.picks(0)[:SAMPLES]]

        def loss_of(number: int, generator: torch.Generator) -> Tensor:
            return self.family.loss(net, to_device(batches(number), processes.device), generator,
                                    settings.caption_dropout)

        return fit(net, loss_of, steps=steps, lr=settings.learning_rate, checkpoint=self.folder / f"state_{number}.pt",
                   seed=settings.seed * 100 + number, warmup=min(settings.warmup, steps // 10),
                   ema_decay=settings.ema_decay, clip_norm=settings.clip_norm, save_every=settings.save_every,
                   on_save=self._on_save, accumulation=settings.accumulation, processes=processes,
                   optimizer=settings.optimizer, on_step=self._on_step)

    def _on_step(self, step: int, losses: list[float], seconds: float, rate: float) -> None:
        own, step = step, self.done + step
        self.rate, self.epoch = rate, (own * self.batches_a_step - 1) // self.per_epoch + 1  # of the stage
        if losses:
            self.loss = losses[-1]
            before = step - len(losses)
            every = max(1, self.steps // LIVE_POINTS)
            self.live = [point for point in self.live if point[0] <= before]  # the run may have rolled back
            self.live += [(number, loss) for number, loss in enumerate(losses, before + 1)
                          if number % every == 0 or not self.live]
        progress = Progress(step, self.steps, self.epoch, self.loss, rate, seconds, self.picture)
        if time.monotonic() - self.said > LINE_EVERY or step == self.steps:
            self.said = time.monotonic()
            log.info("%s: %s", self.result.stem, progress.text)
        self.on_progress(progress)

    def picture(self, headline: str) -> Image.Image:
        """The curves, and below them the latest samples of one clip."""
        plot = draw_curves(read_curves(self.folder)._replace(loss=self.live), headline)
        return stacked(plot, self.first) if self.first else plot

    def _on_save(self, step: int, averaged: nn.Module, loss: float) -> None:
        """Evaluate the EMA weights, log the results, keep the best weights and a copy each `checkpoint_every` steps."""
        settings, step = self.settings, self.done + step
        entry = {"step": step, "epoch": self.epoch, "loss": loss, "learning_rate": self.rate}
        with without_halves(averaged):
            if self.validation:
                entry["validation"] = self._validation_loss(averaged)
            if step % settings.sample_every < settings.save_every or step == self.steps:
                entry |= self._sample(step, averaged)
        score = entry.get("validation", loss)
        curves = read_curves(self.folder)
        append_line(self.folder / "metrics.jsonl", entry)
        if self.ranks and score <= min((value for _, value in (curves.validation if self.validation else curves.loss)),
                        default=score):
            self._export(self.folder / "best.safetensors", averaged, step, whole=False)
        if step % settings.checkpoint_every < settings.save_every and step >= settings.checkpoint_every:
            self._export(self.folder / f"step_{step:07}.safetensors", averaged, step, whole=False)
        plot = draw_curves(read_curves(self.folder), f"{self.result.stem}: step {step} of {self.steps}")
        write_whole(self.folder / "curves.png", lambda path: plot.save(path, "PNG"))
        numbers = {name: value for name, value in entry.items() if name != "step"}
        for track in self.trackers:
            track(step, numbers)
        log.info("%s: %s", self.result.stem, ", ".join(f"{name} {value:.4g}" for name, value in entry.items()))

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
        made = {name: (self.family.encoders.pixels(latent), given, latent.shape[2]) for
                name, (latent, given) in self.family.sample(net, batch, seed=self.settings.seed).items()}
        rows = []
        for clip, caption in enumerate(self.captions):
            own = [(name, frames[clip]) for name, (frames, *_) in made.items()]
            own += [] if truth is None else [("the clip itself", truth[clip])]
            rows += [(f"{own[0][0]}: {caption}", own[0][1]), *own[1:]]
        sheet, self.first = draw_sheet(rows), draw_sheet(rows[:len(rows) // len(self.captions)])
        (self.folder / "samples").mkdir(exist_ok=True)
        write_whole(self.folder / "samples" / f"step_{step:07}.png", lambda path: sheet.save(path, "PNG"))
        frames, given, latent_frames = list(made.values())[-1]
        if truth is None:
            return {}
        first = given * truth.shape[1] // latent_frames
        if first == truth.shape[1]:
            return {}
        error = (frames[:, first:] - truth[:, first:]).square().mean().item()
        return {"psnr": -10 * math.log10(max(error, 1e-10))}

    def _export(self, path: Path, net: nn.Module, step: int, whole: bool = True) -> None:
        """Write the result or, not `whole`, the network's weights alone."""
        about = {"settings": asdict(replace(self.settings, resume=False)), "step": step, "steps": self.steps,
                 "clips": len(self.train_clips), "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        write = self.family.export if whole else self.family.export_weights
        if self.settings.train == "lora":
            write = save_adapters
        write_whole(path, lambda unfinished: write(unfinished, net, {"stillmotion.training": json.dumps(about)}))


def _digest(tensors: Encoded) -> str:
    """Text that differs for encodings that differ by more than rounding."""
    found = sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {tuple(value.shape)}".encode() + (value * 1000).round().int().numpy().tobytes())
    return found.hexdigest()


def to_device(batch: Encoded, device: torch.device) -> Encoded:
    return {name: value.to(device) for name, value in batch.items()}
