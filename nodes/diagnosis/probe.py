"""Finds the first layer of a network that returns NaN or Inf."""
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Origin:
    """The first NaN or Inf. layer: dotted name, "" for the whole network; evaluation: which forward pass."""
    layer: str
    kind: str
    evaluation: int
    nan: int
    inf: int
    values: int
    clean_input: bool
    clean_weights: bool

    def text(self) -> str:
        """A sentence for the user, with what to try."""
        found = f"{self.nan} NaN and {self.inf} Inf of {self.values} values in forward pass {self.evaluation}"
        if not self.layer:
            return f"The network's own input was not finite ({found}). Check the sampler's settings and inputs."
        if not self.clean_weights:
            return (f"First from layer {self.layer} ({self.kind}), whose own weights are not finite: {found}. The file "
                    "is damaged or its training diverged. Get it again, or use an earlier checkpoint.")
        remedy = "Load the model as bf16 or fp32 instead of fp16"
        if self.clean_input:
            return f"First from layer {self.layer} ({self.kind}): {found}, from finite input. {remedy}."
        parent = self.layer.rpartition(".")[0] or "the network"
        return f"First between the layers of {parent}, seen at {self.layer} ({self.kind}): {found}. {remedy}."


class Probe:
    """State of `watch` so far: number of forward passes of the network, and the first `Origin` or None."""

    def __init__(self):
        self.evaluations = 0
        self.origin: Origin | None = None


@contextmanager
def watch(network: nn.Module) -> Iterator[Probe]:
    """Check the outputs of each layer of `network` while the context is open, until the first NaN or Inf.

    Each check synchronises with the device, so use this for a few steps, not for production runs.
    """
    probe = Probe()

    def see(name: str, module: nn.Module, values: list[Tensor], clean_input: bool):
        weights = list(tensors(list(module.parameters(recurse=False))))
        probe.origin = Origin(name, type(module).__name__, probe.evaluations, sum(int(v.isnan().sum()) for v in values),
                              sum(int(v.isinf().sum()) for v in values), sum(v.numel() for v in values), clean_input,
                              finite(weights))

    def before(module, args, kwargs):
        probe.evaluations += 1
        values = list(tensors([args[:1], kwargs.get("x")]))  # the noisy latent; sigma may be infinite
        if probe.origin is None and not finite(values):
            see("", module, values, False)

    def after(name):
        def hook(module, args, kwargs, output):
            if probe.origin is None and not finite(values := list(tensors(output))):
                see(name or "output", module, values, finite(tensors([args, kwargs])))
        return hook

    handles = [module.register_forward_hook(after(name), with_kwargs=True) for name, module in network.named_modules()]
    handles.append(network.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield probe
    finally:
        for handle in handles:
            handle.remove()


def tensors(found) -> Iterator[Tensor]:
    """The floating-point tensors in nested lists, tuples and dicts."""
    if isinstance(found, Tensor):
        if found.is_floating_point():
            yield found
    elif isinstance(found, (list, tuple)):
        for entry in found:
            yield from tensors(entry)
    elif isinstance(found, dict):
        for entry in found.values():
            yield from tensors(entry)


def finite(found) -> bool:
    """Whether no tensor contains NaN or Inf. 8-bit types, which have no Inf, are upcast first."""
    return all(bool((t if t.element_size() > 1 else t.to(torch.bfloat16)).isfinite().all()) for t in found)
