"""The loop of self-rollout: several updates of the fake score for each of the student, with bit-exact resume."""
from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..average import Average, frozen_sums, load_trained, trained_state
from ..logs import append_line, read_state, write_whole
from ..loop import LOOK_EVERY, SEED_STRIDE, BatchLoss, check_base, finite, make_optimizer
from ..parallel import OneProcess

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Which batch of the training a loss is asked for."""

    step: int
    index: int       # among the batches of a step in this process
    number: int      # among all batches of all processes


class Side(NamedTuple):
    """One of the two networks that learn."""

    net: nn.Module
    loss_of: Callable[[Batch, torch.Generator], Tensor]
    lr: float


def fit_both(student: Side, fake: Side, *, steps: int, fake_updates: int, checkpoint: Path, betas: tuple[float, float],
             weight_decay: float, seed: int, warmup: int, ema_decay: float, ema_start: int, clip_norm: float,
             save_every: int, accumulation: int, optimizer: str, processes: OneProcess,
             on_save: Callable[[int, nn.Module, float], None],
             on_step: Callable[[int, list[float], float, float], None]) -> nn.Module:
    """Update the fake score `steps` times and the student before every `fake_updates`-th of these, from the first on.
    Returns the student's moving average, which begins at step `ema_start`.

    Batches, generators and callbacks are as in `loop.fit`; the loss of the logs is the fake score's. The learning rates
    stay constant after the warm-up. FloatingPointError if a loss or weight is NaN or infinite; that state is not saved.
    """
    sides, trained, losses_of, adam = {"student": student, "fake": fake}, {}, {}, {}
    for name, side in sides.items():
        trained[name] = [parameter for parameter in side.net.parameters() if parameter.requires_grad]
        losses_of[name], adam[name] = processes.prepare(
            BatchLoss(side.net, side.loss_of), make_optimizer(optimizer, trained[name], side.lr, betas, weight_decay))
    averaged = Average(student.net, ema_decay, warm_up=False)  # as published; it begins late instead
    base = frozen_sums(student.net) + frozen_sums(fake.net)
    unread: list[Tensor] = []
    losses: list[float] = []
    ahead = False  # the student has made its update of this step
    generator = torch.Generator()

    def update(name: str, step: int) -> Tensor:
        """One update of a network; returns its mean loss, still on the device."""
        side, found = sides[name], []
        for group in adam[name].param_groups:
            group["lr"] = side.lr * min(1, (step + 1) / max(1, warmup))
        for index in range(accumulation):
            number = (step * accumulation + index) * processes.count + processes.rank
            alone = processes.collecting(losses_of[name]) if index < accumulation - 1 else contextlib.nullcontext()
            with alone:
                with processes.autocast():
                    loss = losses_of[name](Batch(step, index, number),
                                           generator.manual_seed(2 * (seed * SEED_STRIDE + number) + (name == "fake")))
                processes.backward(loss / accumulation)
            found.append(loss.detach().float())
        processes.clip_gradients(adam[name], trained[name], clip_norm)
        adam[name].step()
        adam[name].zero_grad(set_to_none=True)
        return torch.stack(found).mean()

    def save(step: int) -> float:
        seconds = time.monotonic() - started
        state = {"net": trained_state(student.net), "optimizer": adam["student"].state_dict(),
                 "averaged": averaged.state_dict(), "fake": trained_state(fake.net),
                 "fake_optimizer": adam["fake"].state_dict(), "scaler": processes.scaler_state(), "base": base,
                 "step": step, "seconds": seconds, "ahead": ahead}
        write_whole(checkpoint, lambda path: torch.save(state, path))
        if not losses:  # stopped right after the last save
            return math.nan
        mean = sum(losses) / len(losses)
        losses.clear()
        append_line(checkpoint.with_suffix(".jsonl"), {"step": step, "loss": mean, "seconds": round(seconds, 1)})
        return mean

    def read(over: Callable[[Tensor], Tensor], step: int) -> list[float]:
        """The fake score's losses since the last read. FloatingPointError if one, or a weight, is not finite."""
        found = over(torch.stack(unread)).tolist() if unread else []
        unread.clear()
        losses.extend(found)
        if not all(map(math.isfinite, found)) or not (finite(student.net) and finite(fake.net)):
            raise FloatingPointError(f"At step {step} a loss or the weights are NaN or infinite: give lower learning "
                                     f"rates, and begin anew or resume from what was saved last in "
                                     f"{checkpoint.parent}.")
        return found

    state = read_state(checkpoint) or {"step": 0, "seconds": 0.0, "ahead": False}
    if "net" in state:
        check_base(checkpoint, base, state.get("base", base))
        load_trained(student.net, state["net"])
        load_trained(fake.net, state["fake"])
        adam["student"].load_state_dict(state["optimizer"])
        adam["fake"].load_state_dict(state["fake_optimizer"])
        averaged.load_state_dict(state["averaged"])
        processes.load_scaler(state.get("scaler", {}))
    step, ahead = state["step"], state["ahead"]
    first, started = step, time.monotonic() - state["seconds"]
    try:
        while step < steps:
            if step % fake_updates == 0 and not ahead:
                update("student", step)
                if step >= ema_start:
                    averaged.update()
            ahead = step % fake_updates == 0
            unread.append(update("fake", step))
            step, ahead = step + 1, False
            due = step % save_every == 0 or step == steps
            found = read(processes.mean, step) if due or step % LOOK_EVERY == 0 or step == first + 1 else []
            if processes.rank > 0:
                continue
            mean = save(step) if due else math.nan
            on_step(step, found, time.monotonic() - started, student.lr)
            if due:
                on_save(step, averaged.module if averaged.updates else student.net, mean)
    except FloatingPointError:
        raise
    except BaseException:
        if processes.rank == 0 and step > first:
            read(lambda own: own, step)  # without the other processes, which may be elsewhere
            save(step)
        raise
    return averaged.module if averaged.updates else student.net
