"""The Triton kernels against PyTorch's operations: on a GPU, elsewhere in Triton's interpreter, if it is installed."""

import os

import pytest
import torch
import torch.nn.functional as F
from stillmotion.nodes.causal_wan.rope import make_rotation
from stillmotion.nodes.common import fused
from stillmotion.nodes.common.attention import torch_attention

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton")
from stillmotion.nodes.common import kernels, kernels_products  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Triton's interpreter multiplies the bits of bfloat16 matrices as if they were integers.
PRODUCTS = [dtype for dtype in TOLERANCE if DEVICE == "cuda" or dtype != torch.bfloat16]
HALF = [dtype for dtype in PRODUCTS if dtype != torch.float32]


@pytest.fixture(autouse=True)
def plain_forms(monkeypatch):
    monkeypatch.setattr(fused, "kernels_for", lambda x: None)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def norm(kind, width, dtype, groups=None, **settings):
    layer = kind(*([groups] if groups else []), width, eps=1e-6, device=DEVICE, dtype=dtype, **settings)
    for seed, weight in enumerate(layer.parameters()):
        weight.data += draw(width, dtype=dtype, seed=seed)
    return layer


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[found.dtype] * expected.abs().max().item())


@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_addition_and_norm(dtype):
    x, branch = draw(2, 12, 24, dtype=dtype), draw(2, 12, 24, dtype=dtype, seed=1)
    gate, scale, shift = draw(2, 3, 6, 24, dtype=dtype, seed=2)[:, :, :3].unbind(2)  # rows of a longer tensor
    affine, plain = norm(torch.nn.LayerNorm, 24, dtype), norm(torch.nn.LayerNorm, 24, dtype, elementwise_affine=False)
    weights = affine.weight, affine.bias
    modulation = scale, shift
    for given, layer, own, changes in ((branch, affine, weights, ()), (branch, plain, modulation, modulation),
                                       (None, plain, modulation, modulation)):
        for gates in (None, gate) if given is not None else (None,):
            expected = fused.add_norm(x, given, gates, layer, *changes)
            found = kernels.add_norm(x, given, gates, *own, 1e-6)
            for pair in zip(found, expected):
                same(*pair)


@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_norm_and_rotation_into_a_ring(dtype):
    heads, rotation = 2, make_rotation(range(5, 7), 2, 3, 12, DEVICE)
    x, layer = draw(2, 12, 24, dtype=dtype), norm(torch.nn.RMSNorm, 24, dtype)
    expected = fused.norm_rotate(x, layer, rotation, heads)
    same(kernels.norm_rotate(x, layer.weight, 1e-6, rotation, heads, None, None), expected)
    (ring, other), slots = torch.zeros(2, 2, 30, 24, dtype=dtype, device=DEVICE), torch.tensor([4, 1], device=DEVICE)
    found = kernels.norm_rotate(x, layer.weight, 1e-6, rotation, heads, ring, slots)
    assert found is ring
    same(found, fused.norm_rotate(x, layer, rotation, heads, other, slots))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gate_and_gelu(dtype):
    x = draw(3, 5, 2 * 1100, dtype=dtype)
    same(kernels.gated_gelu(x), fused.gated_gelu(x))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tokens, channels, width", [(3, 40, 20), (1100, 96, 150)])
def test_linear_layer_with_gate_and_gelu(dtype, tokens, channels, width):
    x, weight, bias = (draw(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(
        ((1, tokens, channels), (2 * width, channels), (2 * width,))))
    same(kernels_products.gated_linear(x, weight, bias), fused.gated_gelu(F.linear(x, weight, bias)))


def test_the_form_of_gelu_of_a_product_is_known():
    assert fused.gpu_applies_gelu(torch.device(DEVICE)) == (DEVICE == "cuda")


@pytest.mark.skipif(DEVICE == "cpu", reason="PyTorch's product for CPUs applies the other form of GELU")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_linear_layer_with_gelu(dtype, monkeypatch):
    x, layer = draw(2, 50, 64, dtype=dtype), torch.nn.Linear(64, 160, dtype=dtype, device=DEVICE)
    monkeypatch.setattr(fused, "applies_gelu", lambda x: True)
    found, expected = fused.linear_gelu(x, layer), F.gelu(layer(x), approximate="tanh")
    # Twice: the GPU's product adds up in another order than that without GELU.
    torch.testing.assert_close(found, expected, rtol=0, atol=2 * TOLERANCE[dtype] * expected.abs().max().item())


@pytest.mark.parametrize("dtype", PRODUCTS)
def test_attention_over_time_in_views_of_one_product(dtype):
    heads, frames, positions, width = 3, 5, 4, 60
    qkv = draw(2, frames * positions, 3 * width, dtype=dtype)
    q, k, v = (x.unflatten(1, (frames, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    out = torch.empty(2, frames * positions, width, dtype=dtype, device=DEVICE)
    kernels_products.attend(q, out.unflatten(1, (frames, -1)).transpose(1, 2), [(k, v)], heads)
    expected = torch_attention(*(x.flatten(0, 1).double() for x in (q, k, v)), heads)
    same(out, expected.unflatten(0, (2, -1)).transpose(1, 2).flatten(1, 2).to(dtype))


@pytest.mark.parametrize("dtype", PRODUCTS)
def test_attention_to_text_and_image_at_once(dtype):
    """The text of a clip, in its frames; more rows than a tile has."""
    heads, clips, frames = 2, 2, 3
    q, (text, image) = draw(clips, frames, 150, 16, dtype=dtype), (
        draw(2, clips, count, 5, 16, dtype=dtype, seed=count) for count in (1, frames))
    sources, out = [(*text.expand(-1, -1, frames, -1, -1),), (*image,)], torch.empty_like(q)
    kernels_products.attend(q, out, sources, heads)
    expected = sum(torch_attention(q.flatten(0, 1).double(), *(x.flatten(0, 1).double() for x in source), heads)
                   for source in sources)
    same(out, expected.unflatten(0, (clips, -1)).to(dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("biased", [True, False])
@torch.no_grad()
def test_sum_and_group_norm(dtype, biased):
    x, branch = (draw(2, 96, 3, 9, 7, dtype=dtype, seed=seed).to(memory_format=torch.channels_last_3d)
                 for seed in (0, 1))
    bias, layer = draw(96, dtype=dtype, seed=2) if biased else None, norm(torch.nn.GroupNorm, 96, dtype, groups=16)
    own = layer.num_groups, layer.weight, layer.bias, layer.eps
    for found, expected in zip(kernels.add_group_norm(x, branch, bias, *own),
                               fused.add_group_norm(x, branch, bias, layer)):
        assert found.is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(found, expected, rtol=0, atol=10 * TOLERANCE[dtype])
    if biased:
        same(kernels.add_bias(x, branch, bias), fused.add_bias(x, branch, bias))
        torch.testing.assert_close(kernels.group_norm(x, *own, bias, True), fused.group_norm(x, layer, add=bias),
                                   rtol=0, atol=10 * TOLERANCE[dtype])


def test_the_checks_before_the_first_use_pass():
    assert fused.gpu_kernels(torch.device(DEVICE)) is kernels
    assert fused.gpu_products(torch.device(DEVICE)) is kernels_products


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape, silu, added", [((2, 96, 9, 7), True, True), ((1, 64, 5, 16, 17), False, False),
                                                ((3, 32, 4, 1), True, False)])
@torch.no_grad()
def test_group_norm_in_channels_last(dtype, shape, silu, added):
    kind = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = (draw(*shape, dtype=dtype) + 20).to(memory_format=kind)  # a mean far above the deviation
    layer = torch.nn.GroupNorm(16, shape[1], device=DEVICE, dtype=dtype)
    layer.weight.data, layer.bias.data = draw(shape[1], dtype=dtype, seed=1), draw(shape[1], dtype=dtype, seed=2)
    add = draw(*shape[:2], dtype=dtype, seed=3) if added else None
    moved = x.double() if add is None else x.double() + add.double().view(*shape[:2], *[1] * (len(shape) - 2))
    expected = F.group_norm(moved, 16, layer.weight.double(), layer.bias.double(), layer.eps)
    expected = (F.silu(expected) if silu else expected).to(dtype)
    found = kernels.group_norm(x, 16, layer.weight, layer.bias, layer.eps, add, silu)
    assert found.is_contiguous(memory_format=kind)
    torch.testing.assert_close(found, expected, rtol=0, atol=10 * TOLERANCE[dtype])
