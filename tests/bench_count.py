"""The operations of one evaluation of a network, counted: kernels, bytes that they read and write, matrix FLOP.

The network runs at full size on meta tensors, so that nothing is computed and any machine can count. The figures are
for a CUDA device: what each operation launches and moves there is in `CUDA`; views are free. Bytes are those of the
arguments and results of every operation, without caches between operations. An attention is one kernel, and so is an
operation of `nodes/common/fused.py`, as on a GPU with Triton; "without_triton" counts their plain forms.
"""
from collections import Counter
from contextlib import ExitStack
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
FREE = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.detach, aten._unsafe_view,
        aten.lift_fresh}


def occupied(tensor) -> int:
    """Bytes that a tensor occupies in memory: an expanded dimension counts once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride()):
        size *= length if stride else 1
    return size


def tensors_of(*values) -> list:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def group_norm(x, *_, result, **__):
    """Moments, their scale and shift, and the result: the input is read twice."""
    return 3, 3 * occupied(x)


def store(ring, axis, slots, x, *, result):
    """What is written into a ring; the rest of it is left alone."""
    return 1, 2 * occupied(x)


def norm_rotate(x, norm, rotation, *_, result):
    return 1, 2 * occupied(x) + occupied(rotation)


def is_last(x) -> bool:
    return x.stride(1) == 1 and x.shape[1] > 1


def convolution(x, weight, bias, *_, result):
    """cuDNN computes 16-bit convolutions channels-last: other layouts are converted before and after. The bias is
    added by a kernel of its own."""
    kernels, moved = 1, occupied(x) + occupied(weight) + occupied(result)
    if x.element_size() == 2 and not is_last(x):
        kernels, moved = kernels + 3, 3 * moved
    if bias is not None:
        kernels, moved = kernels + 1, moved + 2 * occupied(result)
    return kernels, moved


LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
FUSED = {"add_norm", "norm_rotate", "gated_gelu", "group_norm"}
CUDA = {aten.native_group_norm: group_norm, aten.convolution: convolution, aten.index_copy_: store,
        "group_norm": group_norm, "norm_rotate": norm_rotate}


class Operations(TorchDispatchMode):
    """Counts what runs on meta tensors inside it."""

    def __init__(self):
        super().__init__()
        self.kernels, self.moved, self.flop = Counter(), Counter(), 0
        self.inside = False  # an operation that is counted as a whole

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        kind = func.overloadpacket
        if kind is aten.convolution and is_last(args[0]):  # as cuDNN answers; meta tensors forget the layout
            result = result.contiguous(memory_format=LAST[result.ndim])
        if kind in flop_registry:
            self.flop += flop_registry[kind](*args, **(kwargs or {}), out_val=result)
        made = tensors_of(result)
        if self.inside or func.is_view or kind in FREE or not any(tensor.is_meta for tensor in made):
            return result
        self.count(kind, args[1:] if kind is aten.copy_ else args, kwargs, made)
        return result

    def count(self, kind, args, kwargs, made: list) -> None:
        """Count an operation, by itself or by its name. What is written in place is an argument and a result."""
        if kind in CUDA:
            kernels, moved = CUDA[kind](*args, **(kwargs or {}), result=made[0])
        else:
            kernels, moved = 1, sum(map(occupied, [*tensors_of(args, kwargs), *made]))
        name = str(kind).removeprefix("aten.")
        self.kernels[name] += kernels
        self.moved[name] += moved

    def whole(self, function):
        """`function`, counted as one operation under its name."""
        def call(*args, **kwargs):
            before, self.inside = self.inside, True
            try:
                result = function(*args, **kwargs)
            finally:
                self.inside = before
            if not before:
                self.count(function.__name__, args, kwargs, tensors_of(result))
            return result
        return call


def attention(q, k, v, heads, mask=None, **_):
    """The attention of the counted networks: one fused kernel."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return aten._scaled_dot_product_flash_attention(q, k, v)[0].transpose(1, 2).flatten(-2)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def counted(evaluate, fused_functions: dict) -> Operations:
    """One call of `evaluate`; of `fused_functions`, by the module that calls them, each call is one operation."""
    seen, functional = Operations(), torch.nn.functional
    with ExitStack() as stack:
        # PyTorch has one kernel for this on a GPU only; elsewhere it is made of several.
        stack.enter_context(mock.patch.object(functional, "rms_norm", seen.whole(functional.rms_norm)))
        for module, names in fused_functions.items():
            for name in names & vars(module).keys():
                stack.enter_context(mock.patch.object(module, name, seen.whole(getattr(module, name))))
        stack.enter_context(torch.no_grad())
        stack.enter_context(seen)
        evaluate()
    return seen


def count(evaluate, modules) -> dict:
    """Figures of one call of `evaluate` on a GPU. `modules`: those that use fused operations."""
    seen, plain = counted(evaluate, dict.fromkeys(modules, FUSED)), counted(evaluate, {})
    return {"kernels": seen.kernels.total(), "gigabytes": round(seen.moved.total() / 1e9, 3),
            "matrix_teraflop": round(seen.flop / 1e12, 3),
            "without_triton": {"kernels": plain.kernels.total(), "gigabytes": round(plain.moved.total() / 1e9, 3)},
            "by_operation": {name: {"kernels": seen.kernels[name], "gigabytes": round(moved / 1e9, 3)}
                             for name, moved in seen.moved.most_common()}}
