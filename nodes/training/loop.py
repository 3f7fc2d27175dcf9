"""The training loop: one function, resumable to the bit, the same for every network."""
from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then a cosine down to 1 % of it at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def fit(net: nn.Module, loss_of: Callable[[torch.Generator], Tensor], *, steps: int, lr: float, checkpoint: Path,
        seed: int = 0, warmup: int = 100, ema_decay: float = 0.0, clip_norm: float = 1.0, save_every: int = 200,
        on_save: Callable[[int, nn.Module], None] | None = None) -> nn.Module:
    """Train `net` for `steps` steps and return its exponential moving average (the net itself where `ema_decay` is 0).

    `loss_of(generator)` draws a batch and returns its loss. The generator is seeded anew from `seed` and the step, so
    a run that is stopped and started again takes the same path. State goes to `checkpoint`, the loss curve to the
    .jsonl beside it; `on_save(step, averaged_net)` is called after every save.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay)
    averaged = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=average)
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        averaged.load_state_dict(state["averaged"])
        first, seconds = state["step"], state["seconds"]
    started, recent = time.monotonic() - seconds, []
    generator = torch.Generator()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup)
        loss = loss_of(generator.manual_seed(seed * 1_000_003 + step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averaged.update_parameters(net)
        recent.append(loss.detach())
        if (step + 1) % save_every == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            entry = {"step": step + 1, "loss": torch.stack(recent).mean().item(), "seconds": round(seconds, 1)}
            recent.clear()
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "averaged": averaged.state_dict(),
                     "step": step + 1, "seconds": seconds}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            with checkpoint.with_suffix(".jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
            logging.info("%s step %d / %d: loss %.5f, %.0f s", checkpoint.stem, step + 1, steps, entry["loss"], seconds)
            if on_save:
                on_save(step + 1, averaged.module)
    return averaged.module
