"""The Triton kernels against PyTorch's operations: on a GPU, elsewhere in Triton's interpreter, if it is installed."""

import os

import pytest
import torch
import torch.nn.functional as F
from stillmotion.nodes.causal_wan.rope import make_rotation
from stillmotion.nodes.common import fused

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton")
from stillmotion.nodes.common import kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def plain_forms(monkeypatch):
    monkeypatch.setattr(fused, "kernels_for", lambda x: None)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def norm(kind, width, dtype, **settings):
    layer = kind(width, eps=1e-6, device=DEVICE, dtype=dtype, **settings)
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
