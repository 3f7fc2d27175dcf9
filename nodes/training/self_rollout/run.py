"""A training run of self-rollout: `Training` around the loop of two networks."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ..average import halve_frozen
from ..encoding import Batches
from ..families.registry import checkpoint_blocks
from ..loop import SEED_STRIDE
from ..parallel import HALVES
from ..run import SAMPLES, Training, to_device
from .loop import Batch, Side, fit_both
from .method import Piece, Stream

OTHERS = 10 ** 9  # batches of the fake score are numbered from 0; those of the student, and later prompts, from here


class SelfRolloutTraining(Training):
    """`family` is a `SelfRolloutFamily`. There is no validation and no best checkpoint: neither loss says how good the
    videos are."""

    ranks = False

    def _stage(self, number: int, net: nn.Module, size: tuple[int, int], steps: int) -> nn.Module:
        settings, processes, method = self.settings, self.processes, self.family.method
        cache = self._clip_cache(self.family.encode, size)
        batches = Batches(self.dataset, self.train_clips, self.family.encode, size=settings.batch_size,
                          seed=settings.seed, workers=settings.num_workers, stride=processes.count, cache=cache)
        self.batches_a_step, self.per_epoch = settings.accumulation * processes.count, batches.per_epoch
        self.validation = []
        shown = Batches(self.dataset, self.train_clips, self.family.encode, seed=settings.seed, cache=cache,
                        size=min(SAMPLES, len(self.train_clips)))
        self.shown, self.captions = shown(0), [self.dataset[index]["caption"] for index in shown.picks(0)]
        if settings.mixed_precision != "no":
            halve_frozen(method.fake, HALVES[settings.mixed_precision])
        for score in (method.real, method.fake):
            score.to(processes.device)
            if settings.gradient_checkpointing:
                checkpoint_blocks(score, self.family.blocks)
        pieces = Pieces(self, batches)

        def student_loss(batch: Batch, generator: torch.Generator) -> Tensor:
            return method.student_loss(pieces.of_student(batch, generator), generator)

        def fake_loss(batch: Batch, generator: torch.Generator) -> Tensor:
            return method.fake_loss(pieces.of_fake(batch, generator), generator)

        return fit_both(
            Side(net, student_loss, settings.learning_rate), Side(method.fake, fake_loss, settings.fake_learning_rate),
            steps=steps, fake_updates=settings.fake_updates, checkpoint=self.folder / f"state_{number}.pt",
            betas=(settings.adam_beta1, settings.adam_beta2), weight_decay=settings.weight_decay, seed=settings.seed,
            warmup=settings.warmup, ema_decay=settings.ema_decay, ema_start=settings.ema_start,
            clip_norm=settings.clip_norm, save_every=settings.save_every, accumulation=settings.accumulation,
            optimizer=settings.optimizer, processes=processes, on_save=self._on_save, on_step=self._on_step)


class Pieces:
    """What both losses look at: a new rollout for each, or the next piece of one that goes on (`stream_frames`)."""

    def __init__(self, training: SelfRolloutTraining, batches: Batches):
        self.settings, self.family, self.device = training.settings, training.family, training.processes.device
        self.batches = batches
        self.streams: dict[int, Stream] = {}
        self.learned: dict[int, Piece] = {}    # of the student's update, for the fake score's in the same step

    def of_student(self, batch: Batch, generator: torch.Generator) -> Piece:
        if not self.settings.stream_frames:
            return self._new(batch, batch.number + OTHERS, "student", generator, learn=True)
        piece = self._next(batch, "student", generator, learn=True)
        self.learned[batch.index] = piece._replace(x0_BCFHW=piece.x0_BCFHW.detach())
        return piece

    @torch.no_grad()
    def of_fake(self, batch: Batch, generator: torch.Generator) -> Piece:
        if not self.settings.stream_frames:
            return self._new(batch, batch.number, "fake", generator, learn=False)
        return self.learned.pop(batch.index, None) or self._next(batch, "fake", generator, learn=False)

    def _new(self, batch: Batch, number: int, side: str, generator: torch.Generator, learn: bool) -> Piece:
        encoded = to_device(self.batches(number), self.device)
        return self.family.method.roll_out(self.family.conditions(encoded), self.family.shape(encoded),
                                           self._exit(batch, side), generator, learn)

    def _next(self, batch: Batch, side: str, generator: torch.Generator, learn: bool) -> Piece:
        def begin():
            encoded, later = (to_device(self.batches(batch.number + i * OTHERS), self.device) for i in (0, 1))
            count, channels, _, height, width = self.family.shape(encoded)
            return self.family.conditions(encoded, later), (count, channels, height, width)

        stream = self.streams.setdefault(batch.index, Stream(self.family.method, begin))
        stream.begin = begin
        return stream.next(self._exit(batch, side), generator, learn)

    def _exit(self, batch: Batch, side: str) -> int:
        """Drawn from the step alone: the same in all processes and batches of a step."""
        seed = 2 * (self.settings.seed * SEED_STRIDE + batch.step) + (side == "fake")
        return self.family.method.draw_exit(torch.Generator().manual_seed(seed))
