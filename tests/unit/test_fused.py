"""Joined operations in whole networks: the same numbers with a model's weights wherever ComfyUI keeps them."""

import json

import causal_wan_stub as wan
import comfy.model_patcher
import comfy.ops
import comfy.sd
import dynamicrafter_stub as crafter
import plain_kernels
import pytest
import torch
from stillmotion.nodes.common.files import Checkpoint
from stillmotion.nodes.common.fused import lent
from stillmotion.nodes.dynamicrafter.checkpoint import load
from video_unet_stub import make_config, random_network

ALL = {"add_norm", "gated_linear", "attend", "group_norm", "add_group_norm", "add_bias"}
LAYERS = ("input_blocks.1.1.transformer_blocks.0.attn1.to_q", "input_blocks.1.2.transformer_blocks.0.attn2.to_v",
          "middle_block.1.transformer_blocks.0.ff.net.0.proj", "input_blocks.1.0.in_layers.2",
          "middle_block.0.temopral_conv.conv4.3", "output_blocks.0.0.skip_connection")


def sample(model):
    return crafter.sample(model, crafter.conditioning(), steps=1)


def joined(model, monkeypatch):
    """The latent, and the number of calls of each kernel."""
    with monkeypatch.context() as patch:
        kernels = plain_kernels.use(patch)
        return sample(model), kernels.calls


def lora():
    given, found = crafter.weights(), {}
    for seed, layer in enumerate(LAYERS):
        weight = given[f"{layer}.weight"]
        found[f"diffusion_model.{layer}.lora_up.weight"] = crafter.draw(
            weight.shape[0], 2, seed=seed).view(-1, 2, *[1] * (weight.ndim - 2))
        found[f"diffusion_model.{layer}.lora_down.weight"] = 0.1 * crafter.draw(2, *weight.shape[1:], seed=seed + 50)
    return found


def test_joined_operations_give_the_same_numbers(monkeypatch):
    model = crafter.make()
    found, calls = joined(model, monkeypatch)
    assert crafter.difference(found, sample(model)) < 1e-5
    assert calls.keys() == ALL
    assert calls["attend"] == 3 * len(model.model.diffusion_model.context_layers) + 2


def test_causal_wan_too(monkeypatch):
    model = wan.load(wan.strong_tensors(), weight_dtype="fp32")
    expected = wan.sample(frames=4, model=model)
    kernels = plain_kernels.use(monkeypatch)
    with torch.inference_mode():
        assert crafter.difference(wan.sample(frames=4, model=model), expected) < 1e-5
    assert kernels.calls.keys() == {"add_norm", "norm_rotate", "gelu"}


@torch.inference_mode()
def test_the_video_unet_too(monkeypatch):
    network, x = random_network(make_config().params), crafter.draw(2, 9, 5, 8, 6)
    given = x, torch.tensor([3.0, 500.0]), crafter.draw(2, 7, network.params.context_dim, seed=2)
    expected = network(*given)
    kernels = plain_kernels.use(monkeypatch)
    assert crafter.difference(network(*given), expected) < 1e-5
    assert kernels.calls.keys() == ALL - {"add_norm", "gated_linear"}


@pytest.mark.parametrize("frames, words", [(1, 77), (4, 154), (34, 77)])
def test_lengths_that_the_kernels_do_not_take(frames, words, monkeypatch):
    model, conds = crafter.make(), crafter.conditioning(frames=frames, words=words)
    expected = crafter.sample(model, conds, steps=1)
    plain_kernels.use(monkeypatch)
    assert crafter.difference(crafter.sample(model, conds, steps=1), expected) < 1e-5


def streamed(monkeypatch):
    """Load models as where memory is short: nothing stays on the GPU, patches are applied when a layer computes."""
    load = comfy.model_patcher.ModelPatcher.load
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", lambda self, device_to=None, **settings: load(
        self, device_to, **settings | {"lowvram_model_memory": 1, "full_load": False}))


@pytest.mark.parametrize("streams", [False, True])
def test_a_lora_acts_on_joined_operations(streams, monkeypatch):
    model, _ = comfy.sd.load_lora_for_models(crafter.make(), None, lora(), 0.7, 0)
    expected = sample(model)
    assert crafter.difference(sample(crafter.make()), expected) > 1e-3
    if streams:
        streamed(monkeypatch)
        model = model.clone()
        model.model.current_weight_patches_uuid = None
        model.detach()
    found, calls = joined(model, monkeypatch)
    layer = model.model.diffusion_model.get_submodule(LAYERS[0])
    assert bool(getattr(layer, "weight_function", None)) == streams
    assert crafter.difference(found, expected) < 1e-5 and calls.keys() == ALL


def eight_bits():
    header = crafter.HEADER | {"stillmotion.config": json.dumps(crafter.tiny())}
    return load(Checkpoint("model.ckpt", crafter.tensors(), header), weight_dtype="fp8_e4m3fn").model


def test_weights_in_eight_bits(monkeypatch):
    model = eight_bits()
    assert model.model.diffusion_model.middle_block[0].in_layers[2].weight.dtype == torch.float8_e4m3fn
    found, calls = joined(model, monkeypatch)
    assert crafter.difference(found, sample(model)) < 1e-5 and calls.keys() == ALL


def test_streamed_weights_are_not_used_after_their_time(monkeypatch):
    """Core overwrites the buffer of a weight with the next one when the layer has given it back."""
    model, lent_now, given_back = eight_bits(), [], []
    expected, cast = sample(model), comfy.ops.cast_bias_weight

    def lend(layer, x=None, *args, **settings):
        assert not lent_now, "two weights at once, for which there may be one buffer"
        weight, bias = (value if value is None else value.clone()
                        for value in cast(layer, x, *args, **settings | {"offloadable": False}))
        lent_now.append(layer)
        return weight, bias, torch.device("cpu")

    def take_back(layer, weight, bias, stream):
        assert lent_now.pop() is layer
        given_back.append(layer)
        for value in (weight, bias):
            if value is not None:
                value.fill_(torch.nan)

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lend)
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", take_back)
    found, calls = joined(model, monkeypatch)
    assert crafter.difference(found, expected) < 1e-5 and calls.keys() == ALL
    assert {type(layer).__name__ for layer in given_back} >= {"Linear", "Conv2d", "GroupNorm", "LayerNorm"}


def test_another_attention_is_called_in_place_of_the_kernel(monkeypatch):
    model, seen = crafter.make(), []

    def other(function, *args, **kwargs):
        seen.append(args[0].shape)
        return function(*args, **kwargs)

    model.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = other
    expected = sample(model)
    before, seen[:] = len(seen), []
    found, calls = joined(model, monkeypatch)
    assert len(seen) == before and "attend" not in calls and calls.keys() == ALL - {"attend"}
    assert crafter.difference(found, expected) < 1e-5


def test_layers_that_others_have_replaced_compute_themselves(monkeypatch):
    model = crafter.make()
    network = model.model.diffusion_model
    for name in LAYERS:
        layer = network.get_submodule(name)
        layer.forward = lambda x, given=layer.forward: 1.1 * given(x)
        assert lent(layer, crafter.draw(1)) is None
    found, calls = joined(model, monkeypatch)
    assert crafter.difference(found, sample(model)) < 1e-5
    assert crafter.difference(found, sample(crafter.make())) > 1e-3


def test_what_core_lends_is_cast_and_patched():
    layer = comfy.ops.manual_cast.Linear(4, 2, dtype=torch.float16)
    weight, bias = crafter.draw(2, 4), crafter.draw(2)
    layer.weight.data, layer.bias.data = weight.half(), bias.half()
    with lent(layer, crafter.draw(1)) as given:
        assert torch.equal(given[0], weight.half().float()) and torch.equal(given[1], bias.half().float())
    layer.weight_function = [lambda weight: weight + 1]
    with lent(layer, crafter.draw(1)) as given:
        assert torch.equal(given[0], weight.half().float() + 1)


def test_layers_with_products_of_their_own_are_not_lent():
    class Own(comfy.ops.manual_cast.Linear):
        def forward_comfy_cast_weights(self, x):
            return super().forward_comfy_cast_weights(2 * x)

    layer = Own(4, 2, dtype=torch.float16)
    assert lent(layer, crafter.draw(1)) is None
    assert lent(torch.nn.Linear(4, 2, dtype=torch.float16), crafter.draw(1)) is None


def test_heads_too_wide_for_the_kernel(monkeypatch):
    model = crafter.make()
    expected = sample(model)
    kernels = plain_kernels.use(monkeypatch)
    monkeypatch.setattr(plain_kernels.PlainKernels, "MOST_CHANNELS", 4)
    assert crafter.difference(sample(model), expected) < 1e-5 and "attend" not in kernels.calls
