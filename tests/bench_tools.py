"""Shared by the parts of bench.py: timing, memory, random weights."""
import sys
import time
from pathlib import Path

NODES = Path(__file__).resolve().parents[1] / "nodes"
# Tolerance between the latents of the two loops: rounding depends on batch size and summation order.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}


def pixels(size):
    """(width, height) of "832x480"."""
    width, height = size.lower().split("x")
    return int(width), int(height)


def random_weights(shapes, dtype):
    """Random tensors of these shapes by name, scaled to keep activations in range."""
    import torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def weight(key, shape):
        if len(shape) < 2:
            return torch.full(shape, float(key.endswith("weight")), dtype=dtype)
        fan_in = max(1, torch.Size(shape[1:]).numel())
        values = torch.randn(shape, generator=generator, device=device) * fan_in ** -0.5
        return values.to("cpu", dtype)

    return {key: weight(key, shape) for key, shape in shapes.items()}


def describe(options, device):
    """The environment of the measurement."""
    import torch
    return {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "weights": options.dtype,
            "torch": torch.__version__, "threads": torch.get_num_threads()}


def timed(function):
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def peak_megabytes(device):
    import torch
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    if sys.platform == "win32":
        import psutil
        return psutil.Process().memory_info().peak_wset / 2 ** 20
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)
