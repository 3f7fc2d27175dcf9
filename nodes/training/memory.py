"""Memory that a training takes whatever the size of its batches, counted before it starts."""
from __future__ import annotations

import logging

import torch
from torch import nn

log = logging.getLogger(__name__)

STATE_BYTES = {"adamw": 8, "adamw8bit": 2}  # of the optimizer, per trained weight: two averages


def fixed_bytes(net: nn.Module, optimizer: str, averaged: bool) -> dict[str, int]:
    """Bytes by purpose. Gradients and optimizer hold trained weights only, and so does the moving average."""
    weights = list(net.parameters())
    trained = [value for value in weights if value.requires_grad]
    own = sum(value.nbytes for value in trained)
    return {"weights": sum(value.nbytes for value in weights), "gradients": own,
            "optimizer": STATE_BYTES[optimizer] * sum(value.numel() for value in trained),
            "average": own if averaged else 0}


def say_memory(net: nn.Module, optimizer: str, averaged: bool, device: torch.device) -> None:
    """Log the bytes, and warn where the device has fewer."""
    found = fixed_bytes(net, optimizer, averaged)
    total, kinds = sum(found.values()), sorted({str(value.dtype).removeprefix("torch.") for value in net.parameters()})
    parts = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in found.items())
    log.info("Memory: %s (%s), %s in all, and the activations of a batch.", parts, " and ".join(kinds), size(total))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if total > free:
            log.warning("%s has %s free. Less is taken by optimizer adamw8bit, by train lora or projector_temporal, "
                        "and by ema_decay 0.", device, size(free))


def size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
