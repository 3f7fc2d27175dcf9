"""Find the first layer that returns NaN or Inf."""
import pytest
import torch
from stillmotion.nodes.diagnosis.probe import finite, tensors, watch
from torch import nn


class Root(nn.Module):
    """A layer whose own arithmetic, after its child's, may overflow."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)
        self.factor = 1.0

    def forward(self, x):
        return self.after(self.before(x) * self.factor)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), Root(), nn.Linear(4, 4))


def origin_of(net, x=None, evaluations=1):
    with watch(net) as probe:
        for _ in range(evaluations):
            net(torch.randn(2, 4) if x is None else x)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in net.modules())
    return probe.origin


def test_a_clean_network_has_no_origin():
    assert origin_of(network(), evaluations=3) is None


def test_weights_that_are_not_finite_are_blamed():
    net = network()
    net[1].before.weight.data[0, 0] = float("inf")
    net[2].weight.data[:] = float("nan")
    origin = origin_of(net)
    assert (origin.layer, origin.kind, origin.clean_input, origin.clean_weights) == ("1.before", "Linear", True, False)
    assert origin.nan + origin.inf == 2 and origin.values == 8
    assert "1.before (Linear), whose own weights are not finite" in origin.text()


def test_an_overflow_inside_a_layer_is_blamed_on_that_layer():
    net = network()
    net[1].after.weight.data[:] = 1e30
    origin = origin_of(net, 1e30 * torch.ones(2, 4))
    assert origin.layer == "1.after" and origin.clean_input and origin.clean_weights
    assert "from finite input. Load the model as bf16 or fp32" in origin.text()


def test_arithmetic_between_layers_is_blamed_on_their_parent():
    net = network()
    net[1].factor = float("inf")
    text = origin_of(net).text()
    assert "between the layers of 1, seen at 1.after (Linear)" in text


def test_a_bad_input_is_told_from_a_bad_layer():
    origin = origin_of(network(), torch.full((2, 4), float("nan")))
    assert origin.layer == "" and origin.nan == 8 and "network's own input" in origin.text()


def test_the_evaluation_is_counted_from_one():
    net, x = network(), torch.randn(2, 4)
    with watch(net) as probe:
        net(x)
        net[0].bias.data[0] = float("nan")
        net(x)
        net(x)
    assert probe.evaluations == 3 and probe.origin.evaluation == 2 and probe.origin.layer == "0"


def test_hooks_are_removed_when_the_network_fails():
    net = network()
    with pytest.raises(RuntimeError), watch(net):
        net(torch.randn(2, 5))
    assert not any(module._forward_hooks for module in net.modules())


def test_tensors_in_nested_results_are_found():
    bad = torch.tensor([float("inf")])
    assert not finite(tensors({"a": [torch.zeros(1), (bad,)], "b": "text"}))
    assert finite(tensors([torch.tensor([1, 2]), None]))
    assert not finite([torch.tensor([float("nan")]).to(torch.float8_e4m3fn)])
