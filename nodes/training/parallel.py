"""Where a training runs: one process in full precision, or processes managed by accelerate.

accelerate is imported only when needed: for mixed precision, or in a process started by `accelerate launch` or
torchrun.
"""
from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..common.extras import import_extra

PRECISIONS = ("no", "bf16", "fp16")


class OneProcess:
    """The whole training in this process, in plain PyTorch."""

    rank, count = 0, 1

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    def prepare(self, optimizer: torch.optim.Optimizer):
        return optimizer

    def autocast(self):
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def share(self, state):
        """Broadcast an object from the first process to all."""
        return state

    def mean(self, values: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over all processes."""

    def clip_gradients(self, parameters: Sequence[nn.Parameter], norm: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, norm)

    def scaler_state(self) -> dict:
        return {}

    def load_scaler(self, state: dict) -> None:
        pass


class Accelerated(OneProcess):
    """Mixed precision and any number of processes, on GPUs or CPUs, with accelerate.

    Gradients are averaged once per step, after accumulation, no matter how the loss calls the network.
    """

    def __init__(self, accelerator):
        super().__init__(accelerator.device)
        self.accelerator = accelerator
        self.rank, self.count = accelerator.process_index, accelerator.num_processes

    def prepare(self, optimizer: torch.optim.Optimizer):
        return self.accelerator.prepare(optimizer)

    def autocast(self):
        return self.accelerator.autocast()

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def share(self, state):
        from accelerate.utils import broadcast_object_list
        return broadcast_object_list([state])[0]

    def mean(self, values: Sequence[Tensor]) -> None:
        if self.count > 1:
            for value in values:
                value.copy_(self.accelerator.reduce(value, reduction="mean"))

    def clip_gradients(self, parameters: Sequence[nn.Parameter], norm: float) -> Tensor:
        return self.accelerator.clip_grad_norm_(parameters, norm)

    def scaler_state(self) -> dict:
        return self.accelerator.scaler.state_dict() if self.accelerator.scaler else {}

    def load_scaler(self, state: dict) -> None:
        if self.accelerator.scaler and state:
            self.accelerator.scaler.load_state_dict(state)


def launched() -> bool:
    """Whether a launcher (accelerate launch, torchrun) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def make_processes(precision: str = "no", device: torch.device | str = "cpu") -> OneProcess:
    """The processes of this training. `device` applies to a single process; launched ones get their own.

    Raises ValueError for an unknown precision, ImportError (with what to install) if accelerate is missing.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"Mixed precision {precision!r} is unknown: choose one of {', '.join(PRECISIONS)}.")
    cpu = torch.device(device).type == "cpu"
    if precision == "fp16" and cpu:
        raise ValueError("Mixed precision fp16 needs a GPU: choose bf16 or no.")
    if precision == "no" and not launched():
        return OneProcess(device)
    accelerate = import_extra("accelerate", "accelerate", "Training in mixed precision or several processes")
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state()  # left from an earlier training in this process, possibly with another precision
    return Accelerated(accelerate.Accelerator(mixed_precision=precision, cpu=cpu))
