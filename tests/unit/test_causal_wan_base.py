"""Causal Wan as a ComfyUI MODEL: weight dtypes, ComfyUI's layers and attention, conditioning."""

from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from causal_wan_stub import SIZES, load, run, tensors, weights_of
from stillmotion.nodes.causal_wan.model import CausalWan
from stillmotion.nodes.common.attention import torch_attention


@pytest.fixture(autouse=True)
def as_in_the_host():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("name, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_weight_types(name, dtype, stored):
    model = load({key: value.to(stored) for key, value in tensors().items()}, weight_dtype=name)
    assert {value.dtype for value in weights_of(model).values()} == {dtype}
    assert model.model.get_dtype() == dtype


def test_auto_follows_the_host():
    expected = comfy.model_management.unet_dtype(model_params=1, weight_dtype=torch.float32)
    assert load(tensors()).model.get_dtype() == expected


@pytest.mark.parametrize("kind", SIZES)
def test_eight_bits_for_matrices_only(kind):
    exact, small = load(tensors(kind), weight_dtype="fp32"), load(tensors(kind), weight_dtype="fp8_e4m3fn")
    for key, value in weights_of(small).items():
        assert value.dtype == (torch.float8_e4m3fn if value.ndim == 2 else torch.bfloat16), key
    difference = ((run(small, kind) - run(exact, kind)).norm() / run(exact, kind).norm()).item()
    assert 0 < difference < 0.1


def test_the_network_answers_as_the_plain_one():
    """With ComfyUI's attention and layers, for core's samplers: x0 = x - sigma * flow, with full attention."""
    for kind, params in SIZES.items():
        plain = CausalWan(params, torch.nn, torch_attention)
        plain.load_state_dict(tensors(kind))
        generator = torch.Generator().manual_seed(9)
        tokens = torch.randn(1, 5, params.clip_dim, generator=generator) if params.i2v else None
        y = torch.randn(1, params.in_dim - params.out_dim, 3, 4, 6, generator=generator)
        x = torch.randn(1, params.out_dim, 3, 4, 6, generator=generator)
        text = torch.randn(1, 7, params.text_dim, generator=generator)
        flow = plain(torch.cat((x, y), dim=1), torch.full((1, 3), 700.0), plain.project_context(text, tokens),
                     range(3))
        found = run(load(tensors(kind), weight_dtype="fp32"), kind)
        assert torch.allclose(found, x - 0.7 * flow, atol=1e-5)


def conditioning(**changes):
    tower = SimpleNamespace(penultimate_hidden_states=torch.ones(1, 5, 20))
    mask = torch.ones(1, 1, 3, 4, 6)
    mask[:, :, :1] = 0
    return {"noise": torch.zeros(1, 16, 3, 4, 6), "device": torch.device("cpu"), "cross_attn": torch.ones(1, 7, 24),
            "concat_latent_image": torch.zeros(1, 16, 3, 4, 6), "concat_mask": mask,
            "clip_vision_output": tower} | changes


def test_the_image_condition():
    """Four channels that are 1 where a frame is given, then the latent in the network's scale."""
    model = load(tensors("i2v")).model
    found = model.extra_conds(**conditioning())
    y = found["c_concat"].cond
    assert y.shape == (1, 20, 3, 4, 6)
    assert (y[:, :4, 0] == 1).all() and (y[:, :4, 1:] == 0).all()
    assert torch.equal(y[:, 4:], model.process_latent_in(torch.zeros(1, 16, 3, 4, 6)))
    assert found["clip_fea"].cond.shape == (1, 5, 20) and found["c_crossattn"].cond.shape == (1, 7, 24)
    four = torch.cat([conditioning()["concat_mask"]] * 4, dim=1)
    assert torch.equal(model.extra_conds(**conditioning(concat_mask=four))["c_concat"].cond, y)
    assert "c_concat" not in load(tensors()).model.extra_conds(**conditioning())


@pytest.mark.parametrize("changes, words", [
    ({"clip_vision_output": None}, "needs image tokens"),
    ({"concat_latent_image": None}, "needs a masked image latent"),
    ({"concat_mask": None}, "needs a masked image latent"),
    ({"concat_latent_image": torch.zeros(1, 16, 5, 4, 6)}, "latent is 3 x 4 x 6, but the conditioning .* 5 x 4 x 6"),
    ({"concat_mask": torch.zeros(1, 1, 3, 4, 8)}, "3 x 4 x 8"),
    ({"concat_latent_image": torch.zeros(1, 4, 3, 4, 6)}, "has 4 channels, but this model takes 16"),
    ({"cross_attn": torch.ones(1, 7, 32)}, "text encoder gives tokens 32 wide.*24"),
    ({"clip_vision_output": SimpleNamespace(penultimate_hidden_states=torch.ones(1, 5, 32))}, "vision tower .* 32"),
])
def test_bad_conditioning(changes, words):
    with pytest.raises(ValueError, match=words):
        load(tensors("i2v")).model.extra_conds(**conditioning(**changes))
