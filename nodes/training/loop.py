"""The training loop: one function for every network, with bit-exact resume."""
from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.extras import import_extra
from .average import Average, frozen_sums, load_trained, trained_state
from .logs import append_line, read_state, write_whole
from .parallel import OneProcess

log = logging.getLogger(__name__)

OPTIMIZERS = ("adamw", "adamw8bit")
LOOK_EVERY = 10   # steps between reads of the losses; each read waits for the device
BACK_OFF, CUTS = 0.1, 4  # if the loss becomes NaN: factor for the learning rate, and how many times it may be applied
SEED_STRIDE = 1_000_003  # keeps seeds of neighbouring trainings apart


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then cosine decay to 1 % of it at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class BatchLoss(nn.Module):
    """The loss of a batch as the forward pass of a module, which is what DistributedDataParallel wraps."""

    def __init__(self, net: nn.Module, loss_of: Callable[[int, torch.Generator], Tensor]):
        super().__init__()
        self.net, self.loss_of = net, loss_of

    def forward(self, number: int, generator: torch.Generator) -> Tensor:
        return self.loss_of(number, generator)


def make_optimizer(name: str, trained: list[nn.Parameter], lr: float, betas: tuple[float, float] = (0.9, 0.99),
                   weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """One of OPTIMIZERS. ImportError, with what to install, if the package for 8 bits is missing."""
    kind = torch.optim.AdamW
    if name == "adamw8bit":
        kind = import_extra("bitsandbytes", "bitsandbytes", "The 8-bit optimizer").optim.AdamW8bit
    return kind(trained, lr=lr, betas=betas, weight_decay=weight_decay)


def fit(net: nn.Module, loss_of: Callable[[int, torch.Generator], Tensor], *, steps: int, lr: float, checkpoint: Path,
        seed: int = 0, warmup: int = 100, ema_decay: float = 0.0, clip_norm: float = 1.0, save_every: int = 200,
        on_save: Callable[[int, nn.Module, float], None] | None = None, accumulation: int = 1,
        processes: OneProcess = OneProcess(), optimizer: str = "adamw",
        on_step: Callable[[int, list[float], float, float], None] | None = None) -> nn.Module:
    """Train `net` for `steps` steps and return its exponential moving average (the net itself if `ema_decay` is 0).

    `loss_of(number, generator)` draws the batch with this number and returns its loss. A step takes `accumulation`
    batches in each of the `processes`. All batches are numbered, and the generator is reseeded from `seed` and the
    batch number. A stopped and resumed run therefore takes the same path, and two processes take the same path as one
    process with twice the accumulation.

    State (without frozen weights) goes to `checkpoint`, which all processes read, the loss curve to the .jsonl beside
    it. In the first process `on_save(step, averaged_net, mean loss)` is called after every save and `on_step(step,
    losses, seconds, learning rate)` after every step, with the losses read since the last call: they are fetched from
    the device every LOOK_EVERY steps. Any exception from `on_step` or `loss_of` ends the run; the steps since the last
    save are saved first.

    A state with NaN or infinite weights or loss is never saved: the run returns to the last save and continues at a
    tenth of the learning rate. FloatingPointError if there is no save, or after CUTS reductions.
    """
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    loss_of_batch, adam = processes.prepare(BatchLoss(net, loss_of), make_optimizer(optimizer, trained, lr))
    averaged, base = Average(net, ema_decay), frozen_sums(net)
    lead, generator = processes.rank == 0, torch.Generator()
    unread: list[Tensor] = []   # still on the device
    losses: list[float] = []    # since the last save

    def restore() -> dict | None:
        state = read_state(checkpoint)
        if state:
            check_base(checkpoint, base, state.get("base", base))
            load_trained(net, state["net"])
            adam.load_state_dict(state["optimizer"])
            averaged.load_state_dict(state["averaged"])
            processes.load_scaler(state.get("scaler", {}))
        return state

    def read(over: Callable[[Tensor], Tensor]) -> list[float] | None:
        """The losses since the last read, averaged by `over`; None if one is NaN or infinite."""
        found = over(torch.stack(unread)).tolist() if unread else []
        unread.clear()
        losses.extend(found)
        return found if all(map(math.isfinite, found)) else None

    def save(step: int) -> float:
        seconds, mean = time.monotonic() - started, sum(losses) / len(losses)
        losses.clear()
        state = {"net": trained_state(net), "optimizer": adam.state_dict(), "averaged": averaged.state_dict(),
                 "scaler": processes.scaler_state(), "step": step, "seconds": seconds, "lr": lr, "cuts": cuts,
                 "base": base}
        write_whole(checkpoint, lambda path: torch.save(state, path))
        append_line(checkpoint.with_suffix(".jsonl"), {"step": step, "loss": mean, "seconds": round(seconds, 1)})
        return mean

    @contextlib.contextmanager
    def kept(step: int):
        try:
            yield
        except BaseException:
            # Without the other processes, which may be elsewhere.
            if lead and read(lambda own: own) is not None and losses and finite(net):
                save(step)
            raise

    state = restore() or {"step": 0, "seconds": 0.0}
    first = step = state["step"]
    cuts = state.get("cuts", 0) if state.get("lr") == lr else 0  # reset if `lr` was changed
    started = time.monotonic() - state["seconds"]
    while step < steps:
        rate = learning_rate(step, steps, lr, warmup) * BACK_OFF ** cuts
        for group in adam.param_groups:
            group["lr"] = rate
        batches = []
        for i in range(accumulation):
            number = (step * accumulation + i) * processes.count + processes.rank
            alone = processes.collecting(loss_of_batch) if i < accumulation - 1 else contextlib.nullcontext()
            with alone:
                with kept(step), processes.autocast():
                    loss = loss_of_batch(number, generator.manual_seed(seed * SEED_STRIDE + number))
                processes.backward(loss / accumulation if accumulation > 1 else loss)
            batches.append(loss.detach())
        unread.append(torch.stack(batches).mean())
        processes.clip_gradients(adam, trained, clip_norm)
        adam.step()
        adam.zero_grad(set_to_none=True)
        averaged.update()
        step += 1
        due = step % save_every == 0 or step == steps
        found: list[float] | None = []
        if due or step % LOOK_EVERY == 0 or step == first + 1:
            found = read(processes.mean)
        if found is None or due and not finite(net):
            losses.clear()
            back, cuts = restore(), cuts + 1
            if not back or cuts > CUTS:
                raise FloatingPointError(f"After step {step} the loss or the weights are NaN or infinite: give a lower "
                                         "learning rate (with fp16, try bf16), and resume, where a state was saved "
                                         f"before. What was saved last is in {checkpoint.parent}.")
            log.warning("%s: after step %d the loss or the weights are NaN or infinite. Back to step %d, and on at a "
                        "tenth of the learning rate.", checkpoint.stem, step, back["step"])
            step = back["step"]
            continue
        if not lead:
            continue
        if due:
            mean = save(step)
        if on_step:
            with kept(step):
                on_step(step, found, time.monotonic() - started, rate)
        elif due:
            log.info("%s step %d / %d: loss %.5f, %.0f s", checkpoint.stem, step, steps, mean,
                     time.monotonic() - started)
        if due and on_save:
            on_save(step, averaged.module, mean)
    return averaged.module


def check_base(checkpoint: Path, base: list[float], saved: list[float]) -> None:
    """Raise ValueError if the frozen weights are not those of the run (their sums, from `frozen_sums`)."""
    if len(base) != len(saved) or not all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(base, saved)):
        raise ValueError(f"{checkpoint} belongs to a run on other frozen weights: give it the model that it was "
                         "started with, or begin anew under another name.")


def finite(net: nn.Module) -> bool:
    """Whether all weights are finite."""
    return bool(torch.stack([parameter.isfinite().all() for parameter in net.parameters()]).all())
