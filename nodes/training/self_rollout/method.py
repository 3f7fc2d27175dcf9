"""Self-rollout with distribution matching: three networks, and the two losses of an update.

The student rolls out a video block by block. The real score (the teacher, frozen, bidirectional and guided) and the
fake score (trained to follow the student) denoise it whole; their difference is the student's gradient (DMD2, arXiv
2405.14867; Self-Forcing, arXiv 2506.08009). Layouts: B videos, C channels, F latent frames, H, W latent size.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...causal_wan.blocks import Plan, split_frames
from ...causal_wan.model import CausalWan
from ...causal_wan.schedule import make_steps, predict_x0, renoise
from . import matching
from .conditions import Conditions
from .rollout import Rollout, RolloutCache
from .settings import SelfRolloutSettings

STILL_FRAMES = 4  # latent frames decoded before one that becomes a still
Shape = tuple[int, int, int, int, int]  # B, C, F, H, W


class Piece(NamedTuple):
    """Frames of a rollout that the scores look at."""

    x0_BCFHW: Tensor
    conditions: Conditions     # of these frames, as a video of its own
    lead: int                  # frames at the start that no loss looks at
    blocks: tuple[int, ...]


@dataclass(kw_only=True)
class SelfRollout:
    """`still(latent [B, C, F, H, W])` returns the last video frame as the first latent of a video [B, C, 1, H, W].

    Only VAEs that compress time need it (their first latent holds one frame, the others several); None: the latent
    frame itself.
    """

    student: CausalWan
    real: CausalWan
    fake: CausalWan
    settings: SelfRolloutSettings
    block: int
    still: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self):
        self.steps = make_steps(self.settings.rollout_steps, self.settings.rollout_shift, self.settings.rollout_warp)
        for name, net in (("teacher", self.real), ("fake score", self.fake)):
            self._check_score(name, net)
        self.real.requires_grad_(False).eval()

    def _check_score(self, name: str, net: CausalWan) -> None:
        """Raise ValueError for a score that does not know the student's latents and conditions."""
        fields = ("in_dim", "out_dim", "text_dim", "i2v", "clip_dim")
        other = [f"{field} {theirs}, the student {ours}" for field in fields
                 if (theirs := getattr(net.params, field)) != (ours := getattr(self.student.params, field))]
        if other:
            raise ValueError(f"The {name} has {'; '.join(other)}. Give one of the student's kind: the same latents, "
                             "the same text encoder, and image to video for image to video.")

    def plan(self, frames: int, switch: int = 0) -> Plan:
        """The blocks of a rollout; the second prompt begins at latent frame `switch`, 0: there is one."""
        settings = self.settings
        return Plan(blocks=split_frames(frames, self.block, settings.independent_first, short_last=False),
                    steps=self.steps, first_steps=self.steps, context_noise=settings.context_noise,
                    window=settings.rollout_window, sink=settings.rollout_sink, endless=settings.rollout_endless,
                    switches=(switch,) if switch else (), global_sink=True, cfg=1)

    def begin(self, conditions: Conditions, shape: Shape, switch: int, generator: torch.Generator) -> Rollout:
        """A rollout of `shape`, of which nothing is made yet. Its noise is drawn from `generator` on the CPU."""
        conditions.check(self.student.params)
        batch, channels, frames, height, width = shape
        plan, like = self.plan(frames, switch), conditions.negative_BND
        conditions = conditions.lengthened(frames)

        def noise(start: int, count: int, step: int) -> Tensor:
            return torch.randn(batch, channels, count, height, width, generator=generator).to(like)

        def evaluate(x_BCFHW, t_BF, prompt: Tensor, frame_ids, cache, sink_mode):
            keys = self.student.project_context(prompt, conditions.image_BNW)
            return self.student(x_BCFHW, t_BF, keys, frame_ids, cache, sink_mode)

        rollout = Rollout(plan=plan, evaluate=evaluate, y_BYFHW=conditions.y_BYFHW, noise=noise,
                          caches=[RolloutCache(plan.layout(self.student.params, height, width), like.device)],
                          project=lambda number: [conditions.texts[number]], on_step=lambda *_: None)
        first = conditions.first_BC1HW
        alone = first is not None and plan.blocks[0] == 1  # the image is a block of its own: nothing to denoise in it
        return rollout.start(first if alone else None, None if alone else first)

    def draw_exit(self, generator: torch.Generator) -> int:
        """The denoising step that all blocks (of all processes, with the same generator) end at."""
        return int(torch.randint(0, len(self.steps), (), generator=generator))

    def roll_out(self, conditions: Conditions, shape: Shape, exit_step: int, generator: torch.Generator,
                 learn: bool) -> Piece:
        """A new rollout. The scores see its last `gradient_frames`, and only those have a gradient (if `learn`)."""
        rollout, frames = self.begin(conditions, shape, 0, generator), shape[2]
        start = self._scored_from(rollout.plan, frames - self.settings.gradient_frames)
        warm = self.block if start else 0  # a block whose first frame becomes a still
        rollout.exit, rollout.learn_from = exit_step, start + warm if learn else None
        before = rollout.take(start)[:, :, -STILL_FRAMES:] if start else None
        return self.piece(conditions, start, before, rollout.take(frames - start),
                          warm or _given(conditions), prompt=0)

    def _scored_from(self, plan: Plan, wanted: int) -> int:
        """Start of the first block at the latent frame `wanted` or later."""
        starts = [sum(plan.blocks[:index]) for index in range(len(plan.blocks))]
        return next((start for start in starts if start >= wanted), starts[-1])

    def piece(self, conditions: Conditions, start: int, before_BCFHW: Tensor | None, x0_BCFHW: Tensor, lead: int,
              prompt: int) -> Piece:
        """The frames from `start` on as the scores see them; `before` are the latest frames before them, if any."""
        if start and self.still is not None:
            finished = torch.cat((before_BCFHW, x0_BCFHW[:, :, :1].detach()), dim=2)
            x0_BCFHW = torch.cat((self.still(finished).to(x0_BCFHW), x0_BCFHW[:, :, 1:]), dim=2)
        count = x0_BCFHW.shape[2]
        known = conditions.lengthened(start + count).scored(start, count, prompt, x0_BCFHW[:, :, :1].detach())
        alone = self.settings.independent_first and not start
        return Piece(x0_BCFHW, known, lead, split_frames(count, self.block, alone, short_last=True))

    def student_loss(self, piece: Piece, generator: torch.Generator) -> Tensor:
        """The distribution-matching loss; its gradient reaches the student through the piece's x0 alone."""
        known, settings = piece.conditions, self.settings
        with torch.no_grad():
            noisy_BCFHW, t_BF, _ = self._noised(piece, generator)
            real, away = (self._x0(self.real, noisy_BCFHW, t_BF, text, known) for text in (known.texts[0],
                                                                                         known.negative_BND))
            real = matching.guided(real, away, settings.teacher_cfg)
            fake = self._x0(self.fake, noisy_BCFHW, t_BF, known.texts[0], known)
        return matching.student_loss(piece.x0_BCFHW, real, fake, piece.lead)

    def fake_loss(self, piece: Piece, generator: torch.Generator) -> Tensor:
        """The fake score's denoising loss on a rollout; the student gets no gradient."""
        noisy_BCFHW, t_BF, noise = self._noised(piece, generator)
        flow = self._flow(self.fake, noisy_BCFHW, t_BF, piece.conditions.texts[0], piece.conditions)
        return matching.flow_loss(flow, piece.x0_BCFHW.detach(), noise, piece.lead)

    def _noised(self, piece: Piece, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(noisy frames, timesteps [B, F], noise); a given first latent stays clean, at timestep 0."""
        settings, x0_BCFHW = self.settings, piece.x0_BCFHW.detach()
        t_BF = matching.draw_timesteps(len(x0_BCFHW), piece.blocks, shift=settings.score_shift, low=settings.score_min,
                                       high=settings.score_max, per_block=settings.score_per_block,
                                       generator=generator)
        t_BF[:, :_given(piece.conditions)] = 0
        t_BF = t_BF.to(x0_BCFHW.device)
        noise = torch.randn(x0_BCFHW.shape, generator=generator).to(x0_BCFHW)
        return renoise(x0_BCFHW, noise, matching.sigmas(t_BF)).to(x0_BCFHW), t_BF, noise

    def _x0(self, net: CausalWan, noisy_BCFHW: Tensor, t_BF: Tensor, text_BND: Tensor, known: Conditions) -> Tensor:
        return predict_x0(noisy_BCFHW, self._flow(net, noisy_BCFHW, t_BF, text_BND, known), matching.sigmas(t_BF))

    def _flow(self, net: CausalWan, noisy_BCFHW: Tensor, t_BF: Tensor, text_BND: Tensor, known: Conditions) -> Tensor:
        """A score's flow of the whole video at once, in the precision of its weights. A fake score in training has
        activations in float32 even if frozen matrices are halves; its modulation tells."""
        known.check(net.params)
        x_BCFHW = noisy_BCFHW if known.y_BYFHW is None else torch.cat((noisy_BCFHW, known.y_BYFHW), dim=1)
        dtype = net.head.modulation.dtype
        image_BNW = None if known.image_BNW is None else known.image_BNW.to(dtype)
        keys = net.project_context(text_BND.to(dtype), image_BNW)
        return net(x_BCFHW.to(dtype), t_BF, keys, range(x_BCFHW.shape[2])).to(noisy_BCFHW)


def _given(conditions: Conditions) -> int:
    """Number of clean frames at the start of a video."""
    return 0 if conditions.first_BC1HW is None else 1


class Stream:
    """Rollouts that go on over several updates, with their caches kept and a change of prompt on the way (LongLive's
    streaming tuning, arXiv 2509.22622). `begin()` returns two prompts' conditions and [B, C, H, W] of a new video."""

    def __init__(self, method: SelfRollout, begin: Callable[[], tuple[Conditions, Sequence[int]]]):
        self.method, self.begin, self.rollout = method, begin, None

    def next(self, exit_step: int, generator: torch.Generator, learn: bool) -> Piece:
        """The next piece: `stream_new` new frames, behind some finished before, which no loss looks at."""
        settings = self.method.settings
        if self.rollout is None or self.rollout.position == self.rollout.plan.frames:
            self._restart(generator)
        start = self.rollout.position
        overlap = settings.gradient_frames - settings.stream_new if start else 0
        self.rollout.exit, self.rollout.learn_from = exit_step, start if learn else None
        made = self.rollout.take(settings.gradient_frames - overlap)
        whole = torch.cat((self.recent, made), dim=2) if start else made
        self.recent = whole[:, :, settings.stream_new - settings.gradient_frames - STILL_FRAMES:].detach()
        before, window = whole.tensor_split([whole.shape[2] - settings.gradient_frames], dim=2)
        return self.method.piece(self.conditions, start - overlap, before, window, overlap or _given(self.conditions),
                                 prompt=int(0 < self.switch <= start))

    def _restart(self, generator: torch.Generator) -> None:
        settings, (self.conditions, (batch, channels, height, width)) = self.method.settings, self.begin()
        switches = settings.switches()
        self.switch = switches[int(torch.randint(0, len(switches), (), generator=generator))] if switches else 0
        frames = settings.gradient_frames + settings.stream_new * len(settings.stream_starts())
        self.rollout = self.method.begin(self.conditions, (batch, channels, frames, height, width), self.switch,
                                         generator)
        self.recent = None
