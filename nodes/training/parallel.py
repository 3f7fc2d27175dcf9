"""Where a training runs: one process in full precision, or processes managed by accelerate.

accelerate is imported only when needed: for mixed precision, or in a process started by `accelerate launch` or
torchrun.
"""
from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..common.extras import import_extra

log = logging.getLogger(__name__)

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("no", *HALVES)


class OneProcess:
    """The whole training in this process, in plain PyTorch."""

    rank, count = 0, 1

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    def prepare(self, loss: nn.Module, optimizer: torch.optim.Optimizer):
        """(loss, optimizer) for `backward`. `loss` is a module whose forward pass is the loss of a batch and whose
        weights are trained."""
        return loss, optimizer

    def collecting(self, loss: nn.Module):
        """Context of all batches of a step but the last: their gradients are added up in this process only."""
        return contextlib.nullcontext()

    def autocast(self):
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def mean(self, value: Tensor) -> Tensor:
        """Mean over all processes."""
        return value

    def clip_gradients(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter],
                       norm: float) -> Tensor:
        """Limit the gradients of an optimizer that `prepare` returned."""
        return torch.nn.utils.clip_grad_norm_(parameters, norm)

    def scaler_state(self) -> dict:
        return {}

    def load_scaler(self, state: dict) -> None:
        pass


class Accelerated(OneProcess):
    """Mixed precision and any number of processes, on GPUs or CPUs, with accelerate.

    PyTorch's DistributedDataParallel wraps the loss, not the network: the loss may call the network in any way and any
    number of times. Gradients are averaged in buckets during the backward pass of a step's last batch.
    """

    def __init__(self, accelerator):
        super().__init__(accelerator.device)
        self.accelerator = accelerator
        self.rank, self.count = accelerator.process_index, accelerator.num_processes

    def prepare(self, loss: nn.Module, optimizer: torch.optim.Optimizer):
        self.accelerator.free_memory()  # accelerate would keep the networks of earlier stages
        return self.accelerator.prepare(loss, optimizer)

    def collecting(self, loss: nn.Module):
        return self.accelerator.no_sync(loss)

    def autocast(self):
        return self.accelerator.autocast()

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def mean(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, reduction="mean") if self.count > 1 else value

    def clip_gradients(self, optimizer, parameters: Sequence[nn.Parameter], norm: float) -> Tensor:
        # Not accelerate's own function, which unscales fp16 gradients of the optimizer prepared last alone.
        self.accelerator.unscale_gradients(optimizer)
        return super().clip_gradients(optimizer, parameters, norm)

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
    if not launched() and "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
        # What accelerate launch leaves when it was asked for several processes and starts a single one.
        log.warning("accelerate launch was asked for several processes, but started only this one: it finds %s. Give "
                    "it --multi_gpu for several GPUs; on CPUs use torchrun --nproc_per_node N instead.",
                    f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU")
    if precision == "no" and not launched():
        return OneProcess(device)
    accelerate = import_extra("accelerate", "accelerate", "Training in mixed precision or several processes")
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state()  # left from an earlier training in this process, possibly with another precision
    # Some losses leave weights out (an image's, in a text-to-video batch).
    buckets = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True,
                                                       broadcast_buffers=False)
    processes = Accelerated(accelerate.Accelerator(mixed_precision=precision, cpu=cpu, kwargs_handlers=[buckets]))
    if processes.rank == 0 and processes.count > 1:
        log.info("%d processes train together: a step takes the batches of all.", processes.count)
    return processes
