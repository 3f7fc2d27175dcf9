"""Where a training runs: one process in full precision, or what accelerate makes of it.

The package accelerate is imported only where it is needed: for mixed precision, or in a process that
`accelerate launch` or torchrun has started.
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
    """The whole training in this process, as PyTorch computes it by itself."""

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
        """What the first process has, for all."""
        return state

    def mean(self, values: Sequence[Tensor]) -> None:
        """Put the mean over all processes into every tensor."""

    def clip_gradients(self, parameters: Sequence[nn.Parameter], norm: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, norm)

    def scaler_state(self) -> dict:
        return {}

    def load_scaler(self, state: dict) -> None:
        pass


class Accelerated(OneProcess):
    """Mixed precision and any number of processes, on GPUs or CPUs, by accelerate.

    Gradients are averaged once a step, after accumulation, whatever way a loss used the network.
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
    """The processes of this training. `device` is where one process computes; launched ones have their own.

    Raises ValueError for an unknown precision, ImportError (with what to install) where accelerate is missing.
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
    AcceleratorState._reset_state()  # of an earlier training in this process, perhaps of another precision
    return Accelerated(accelerate.Accelerator(mixed_precision=precision, cpu=cpu))
