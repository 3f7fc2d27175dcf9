"""The training loop: one function, resumable to the bit, the same for every network."""
from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .parallel import OneProcess

SEED_STRIDE = 1_000_003  # seeds of neighbouring trainings do not meet


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then a cosine down to 1 % of it at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def fit(net: nn.Module, loss_of: Callable[[torch.Generator], Tensor], *, steps: int, lr: float, checkpoint: Path,
        seed: int = 0, warmup: int = 100, ema_decay: float = 0.0, clip_norm: float = 1.0, save_every: int = 200,
        on_save: Callable[[int, nn.Module], None] | None = None, accumulation: int = 1,
        processes: OneProcess = OneProcess(),
        on_step: Callable[[int, Tensor, float], None] | None = None) -> nn.Module:
    """Train `net` for `steps` steps and return its exponential moving average (the net itself where `ema_decay` is 0).

    `loss_of(generator)` draws a batch and returns its loss. A step takes `accumulation` batches in each of the
    `processes`; all are numbered, and the generator is seeded anew from `seed` and that number. So a run that is
    stopped and started again takes the same path, and two processes take that of one which accumulates twice as much.

    State goes to `checkpoint`, the loss curve to the .jsonl beside it. In the first process `on_save(step,
    averaged_net)` is called after every save and `on_step(step, loss, seconds)` after every step. Whatever `on_step` or
    `loss_of` raises ends the run, with what was learned since the last save kept.
    """
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = processes.prepare(torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=0.0))
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay)
    averaged = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=average)
    first, seconds, lead = 0, 0.0, processes.rank == 0
    state = processes.share(
        torch.load(checkpoint, map_location="cpu", weights_only=True) if lead and checkpoint.exists() else None)
    if state:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        averaged.load_state_dict(state["averaged"])
        processes.load_scaler(state.get("scaler", {}))
        first, seconds = state["step"], state["seconds"]
    started, recent = time.monotonic() - seconds, []
    generator = torch.Generator()

    def save(step: int) -> dict:
        seconds = time.monotonic() - started
        entry = {"step": step, "loss": torch.stack(recent).mean().item(), "seconds": round(seconds, 1)}
        recent.clear()
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "averaged": averaged.state_dict(),
                 "scaler": processes.scaler_state(), "step": step, "seconds": seconds}
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
        with checkpoint.with_suffix(".jsonl").open("a") as log:
            log.write(json.dumps(entry) + "\n")
        return entry

    @contextlib.contextmanager
    def kept(step: int):
        try:
            yield
        except BaseException:
            if recent:
                save(step)
            raise

    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup)
        losses = []
        for i in range(accumulation):
            number = (step * accumulation + i) * processes.count + processes.rank
            with kept(step), processes.autocast():
                loss = loss_of(generator.manual_seed(seed * SEED_STRIDE + number))
            processes.backward(loss / accumulation if accumulation > 1 else loss)
            losses.append(loss.detach())
        loss = torch.stack(losses).mean()
        processes.mean([loss, *(parameter.grad for parameter in trained if parameter.grad is not None)])
        processes.clip_gradients(trained, clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averaged.update_parameters(net)
        if not lead:
            continue
        recent.append(loss)
        due = (step + 1) % save_every == 0 or step + 1 == steps
        if due:
            entry = save(step + 1)
            logging.info("%s step %d / %d: loss %.5f, %.0f s", checkpoint.stem, step + 1, steps, entry["loss"],
                         entry["seconds"])
        if on_step:
            with kept(step + 1):
                on_step(step + 1, loss, time.monotonic() - started)
        if due and on_save:
            on_save(step + 1, averaged.module)
    return averaged.module
