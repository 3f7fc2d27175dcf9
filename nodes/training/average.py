"""Exponential moving average of a network's weights."""
from __future__ import annotations

import contextlib
from copy import deepcopy

import torch
from torch import Tensor, nn


class Average:
    """The moving average of the weights that are trained, as the network `module`; frozen weights are shared with the
    network itself, and with `decay` 0 it is the network itself.

    The first update copies the weights. With `warm_up` the n-th update decays by (1 + n) / (10 + n) at most: while a
    run is short, the average is one over its latest tenth, and not its first weights. State dicts are those of torch's
    AveragedModel, without the frozen weights.
    """

    def __init__(self, net: nn.Module, decay: float, warm_up: bool = True):
        self.net, self.decay, self.warm_up, self.updates = net, decay, warm_up, 0
        self.module = net if not decay else deepcopy(
            net, {id(parameter): parameter for parameter in net.parameters() if not parameter.requires_grad})
        self.pairs = [(mine, theirs) for mine, theirs in zip(self.module.parameters(), net.parameters())
                      if mine is not theirs]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the network's present weights."""
        if self.pairs and self.updates:
            most = (1 + self.updates) / (10 + self.updates) if self.warm_up else 1
            lerp = torch.optim.swa_utils.get_ema_multi_avg_fn(min(self.decay, most))
            lerp(*map(list, zip(*self.pairs)), None)
        else:
            for mine, theirs in self.pairs:
                mine.copy_(theirs)
        for mine, theirs in zip(self.module.buffers(), self.net.buffers()):
            mine.copy_(theirs)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        weights = {} if self.module is self.net else trained_state(self.module)
        return {"n_averaged": torch.tensor(self.updates), **{f"module.{key}": value for key, value in weights.items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.updates = int(state["n_averaged"])
        if self.module is not self.net:
            load_trained(self.module, {key.removeprefix("module."): value for key, value in state.items()
                                       if key.startswith("module.")})


def frozen_names(net: nn.Module) -> set[str]:
    return {name for name, parameter in net.named_parameters() if not parameter.requires_grad}


def trained_state(net: nn.Module) -> dict[str, Tensor]:
    """The state dict without the weights that are not trained."""
    frozen = frozen_names(net)
    return {key: value for key, value in net.state_dict().items() if key not in frozen}


def load_trained(net: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state dict that may lack frozen weights. ValueError if it does not fit the network."""
    own, frozen = net.state_dict(), frozen_names(net)
    wrong = sorted((own.keys() - frozen - state.keys()) | (state.keys() - own.keys())
                   | {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape})
    if wrong:
        raise ValueError(f"The saved state is of another network ({len(wrong)} weights differ in name or size: "
                         f"{', '.join(wrong[:3])}). Give the settings that the run was started with.")
    net.load_state_dict(state, strict=False)


def halve_frozen(net: nn.Module, dtype: torch.dtype) -> None:
    """Store frozen weights of linear layers and convolutions in half precision: mixed precision reads them in it alone.
    Other weights (norms, modulations) are read as they are, beside activations in float32."""
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


@contextlib.contextmanager
def without_halves(net: nn.Module):
    """The network with all weights in float32, for computations outside of mixed precision."""
    halves = [(parameter, parameter.data) for parameter in net.parameters() if parameter.dtype != torch.float32]
    for parameter, half in halves:
        parameter.data = half.float()
    try:
        yield
    finally:
        for parameter, half in halves:
            parameter.data = half


@torch.no_grad()
def frozen_sums(net: nn.Module) -> list[float]:
    """Sums of the absolute frozen weights, one per tensor: they tell one base network from another."""
    sums = [value.float().abs().sum() for value in net.parameters() if not value.requires_grad]
    return torch.stack(sums).tolist() if sums else []
