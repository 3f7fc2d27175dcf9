"""The counter of bench.py --count, on operations whose figures are known."""

import bench_count
import torch
from bench_count import meta

HALF = torch.float16


def figures(evaluate):
    found = bench_count.count(evaluate)
    return found["kernels"], round(found["gigabytes"] * 1e9), found["matrix_teraflop"]


def test_a_product_reads_its_matrices_and_views_are_free():
    a, b = meta(2000, 3000, dtype=HALF), meta(4000, 3000, dtype=HALF)
    assert figures(lambda: (a @ b.T).view(-1, 2).transpose(0, 1)) == (1, 2 * (6 + 12 + 8) * 10 ** 6, 0.048)


def test_an_expanded_tensor_is_read_once_and_what_is_written_in_place_counts():
    a, row = meta(1000, 4000), meta(4000)
    assert figures(lambda: a.add_(row.expand(1000, -1)))[:2] == (1, 4 * (4 + 4) * 10 ** 6)
    assert figures(lambda: a[:500].copy_(a[500:]))[:2] == (1, 4 * (2 + 2) * 10 ** 6)


def test_a_convolution_in_another_layout_is_converted_and_its_bias_added():
    x, conv = meta(4, 50, 200, 100, dtype=HALF), torch.nn.Conv2d(50, 50, 3, padding=1, dtype=HALF, device="meta")
    kernels, moved, flop = figures(lambda: conv(x))
    assert kernels == 5 and moved == 8 * 8_000_000 and flop == 0.004
    last = x.contiguous(memory_format=torch.channels_last)
    assert figures(lambda: conv(last))[:2] == (2, 4 * 8_000_000)


def test_what_a_gpu_does_in_one_kernel_is_one():
    x, scale = meta(1000, 1000), meta(1000)
    assert figures(lambda: torch.nn.functional.rms_norm(x, (1000,), scale))[:2] == (1, 8_000_000)
    q = meta(1, 1000, 1000, dtype=HALF)
    assert figures(lambda: bench_count.attention(q, q, q, 10))[:2] == (1, 8_000_000)
