"""Recipe of the causal Wan demo in few steps without guidance: self-rollout of the causal Wan demo on its own clips.

Three stages, each resumable. A bidirectional teacher is trained further from the causal demo, on windows that begin
anywhere in a clip; then the demo learns from its own windows, then from videos that go on and turn (`self_rollout`).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...causal_wan.model import CausalWan
from ...common.demo import CAUSAL_WAN
from ..loop import fit
from ..parallel import OneProcess
from ..self_rollout.conditions import Conditions
from ..self_rollout.loop import Batch, Side, fit_both
from ..self_rollout.method import SelfRollout, Stream
from ..self_rollout.settings import SelfRolloutSettings
from .causal_wan import BLANK, BLOCK, SHIFT, SINK, demo_network, export, image_condition
from .causal_wan_clips import FRAMES, PARTS, WINDOW, encode_clips
from .fast import device
from .laws import block_sigmas

# Self-Forcing's settings with the demo's window and guidance; small networks learn at higher rates.
SETTINGS = SelfRolloutSettings(
    rollout_shift=SHIFT, rollout_window=WINDOW, rollout_sink=SINK, rollout_endless=True, gradient_frames=WINDOW,
    teacher_cfg=1.5, fake_learning_rate=2e-4, ema_start=200)
LONG = replace(SETTINGS, stream_frames=40, stream_new=12, stream_switch_first=1, fake_learning_rate=1e-4)
STUDENT_LR = {False: 5e-5, True: 2e-5}  # by whether videos go on


def pick_texts(encodings: dict[str, Tensor], kind: str, pick: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Texts before and after the turn, in one of the clips' wordings."""
    captions = encodings[f"{kind}caption"][pick]
    form = torch.randint(0, captions.shape[2], (len(pick),), generator=generator)
    return [encodings["text"][captions[torch.arange(len(pick)), part, form]] for part in (0, 1)]


def teacher_loss(net: CausalWan, encodings: dict[str, Tensor], size: int, rng: Random,
                 generator: torch.Generator) -> Tensor:
    """Flow matching of whole windows, one noise level each, with the window's first frame as start image.

    Windows begin anywhere between turns, because the student's long videos are scored from their middle. One text in
    ten is dropped, half of the image tokens, and now and then the start image.
    """
    start, kind = rng.choice((0, rng.randrange(FRAMES - WINDOW + 1))), rng.choice(("", "short_"))
    start, turn = (0, 0) if kind else (start, encodings["turn"])
    group = ((turn <= start) if not kind else encodings["short_turn"] == 0).nonzero()[:, 0]
    pick = group[torch.randint(0, len(group), (size,), generator=generator)]
    z = encodings[f"{kind}latents"][pick].float()[:, :, start:start + WINDOW]
    text = pick_texts(encodings, kind, pick, generator)[1]
    dropped = torch.rand(size, generator=generator) < 0.1
    text = torch.where(dropped[:, None, None], encodings["text"][0], text)
    blank = rng.random() < BLANK
    grey = (torch.rand(size, generator=generator) < 0.5) | blank
    tokens = torch.where(grey[:, None, None], encodings["grey_tokens"], encodings[f"{kind}tokens"][pick])
    y = image_condition(z[:, :, 0], encodings["grey"], WINDOW, blank)
    z, y, text, tokens = (value.to(device()) for value in (z, y, text, tokens))
    sigma_B1 = block_sigmas((size, 1), SHIFT, generator).to(z)
    sigma, noise = sigma_B1[:, :, None, None, None], torch.randn(z.shape, generator=generator).to(z)
    noisy = torch.cat(((1 - sigma) * z + sigma * noise, y), dim=1)
    flow = net(noisy, 1000 * sigma_B1.expand(-1, WINDOW), net.project_context(text, tokens), range(WINDOW))
    change_B1HW = (z.amax(2) - z.amin(2)).amax(1, keepdim=True)
    weight_B11HW = 1 + 4 * (change_B1HW > 0.5)[:, :, None]
    return (weight_B11HW * (flow - (noise - z)).square()).mean()


def train_teacher(net: CausalWan, encodings: dict[str, Tensor], checkpoint: Path, steps: int, size: int, lr: float,
                  save_every: int = 100) -> CausalWan:
    net, rng = net.to(device()), Random()

    def loss_of(number: int, generator: torch.Generator) -> Tensor:
        rng.seed(generator.initial_seed())
        return teacher_loss(net, encodings, size, rng, generator)

    return fit(net, loss_of, steps=steps, lr=lr, checkpoint=checkpoint, seed=31, ema_decay=0.998,
               save_every=save_every)


def draw_conditions(encodings: dict[str, Tensor], size: int, generator: torch.Generator) -> Conditions:
    """Start images of clips with their captions before and after the turn. The image tokens are the images' own."""
    pick = torch.randint(0, len(encodings["latents"]), (size,), generator=generator)
    y = image_condition(encodings["latents"][pick, :, 0].float(), encodings["grey"], FRAMES)
    return Conditions(texts=tuple(text.to(device()) for text in pick_texts(encodings, "", pick, generator)),
                      y_BYFHW=y.to(device()), image_BNW=encodings["tokens"][pick].to(device()), first_BC1HW=None,
                      negative_BND=encodings["text"][:1].expand(size, -1, -1).to(device()))


def train_student(student: CausalWan, teacher: CausalWan, fake: CausalWan, encodings: dict[str, Tensor],
                  checkpoint: Path, steps: int, size: int, long: bool, save_every: int = 100) -> CausalWan:
    """Self-rollout; with `long` videos go on over several steps and turn."""
    for net in (student, teacher, fake):
        net.to(device())
    method = SelfRollout(student=student, real=teacher, fake=fake, settings=LONG if long else SETTINGS, block=BLOCK)
    channels, height, width = encodings["latents"].shape[1], *encodings["latents"].shape[3:]
    draws, held = torch.Generator(), []

    def new() -> tuple[Conditions, Sequence[int]]:
        return draw_conditions(encodings, size, draws), (size, channels, height, width)

    stream = Stream(method, new)

    def piece(generator: torch.Generator, learn: bool):
        draws.manual_seed(generator.initial_seed())
        exit_step = method.draw_exit(generator)
        if long:
            return stream.next(exit_step, generator, learn)
        known, (_, *latent) = new()
        return method.roll_out(known, (size, latent[0], WINDOW, *latent[1:]), exit_step, generator, learn)

    def student_loss(batch: Batch, generator: torch.Generator) -> Tensor:
        made = piece(generator, learn=True)
        if long:
            held.append(made._replace(x0_BCFHW=made.x0_BCFHW.detach()))
        return method.student_loss(made, generator)

    def fake_loss(batch: Batch, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            made = held.pop() if held else piece(generator, learn=False)
        return method.fake_loss(made, generator)

    return fit_both(Side(student, student_loss, STUDENT_LR[long]),
                    Side(fake, fake_loss, method.settings.fake_learning_rate), steps=steps,
                    fake_updates=method.settings.fake_updates, checkpoint=checkpoint, betas=(0.0, 0.999),
                    weight_decay=0.01, seed=33 + long, warmup=0, ema_decay=0.99, ema_start=method.settings.ema_start,
                    clip_norm=10.0, save_every=save_every, accumulation=1, optimizer="adamw", processes=OneProcess(),
                    on_save=lambda *_: None, on_step=lambda *_: None)


def causal_demo() -> CausalWan:
    """The causal Wan demo as it is in the pack."""
    net = demo_network()
    net.load_state_dict({key: value.float() for key, value in load_file(CAUSAL_WAN).items()})
    return net


def make_few_demo(folder: Path, target: Path, size: int = 8, stages: Sequence[int] = (6000, 3000, 1500)) -> None:
    """Run the stages (steps of the teacher, of windows, of videos that go on) in `folder`, then write the file."""
    folder.mkdir(parents=True, exist_ok=True)
    encodings = encode_clips(folder, PARTS)
    teacher = train_teacher(causal_demo(), encodings, folder / "causal_wan_teacher.pt", stages[0], size, 6e-4)
    export(folder / "causal_wan_teacher.safetensors", teacher, causal=False)
    student, fake = causal_demo(), demo_network()
    fake.load_state_dict(teacher.state_dict())
    for long, steps in enumerate(stages[1:]):
        state = folder / f"causal_wan_few_{long + 1}.pt"
        student = train_student(student, teacher, fake, encodings, state, steps, size, bool(long))
    export(target, student)
