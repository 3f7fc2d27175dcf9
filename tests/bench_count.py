"""The operations of one evaluation of a network, counted: kernels, bytes that they read and write, matrix FLOP.

The network runs at full size on meta tensors, so that nothing is computed and any machine can count. The figures are
for a CUDA device: what each operation launches and moves there is in `CUDA`; views are free. Bytes are those of the
arguments and results of every operation, without caches between operations. An attention is one kernel, and so is one
of the Triton kernels, which are replaced by `Kernels` below; "without_triton" counts PyTorch's operations instead.
"""
from collections import Counter
from contextlib import ExitStack
from unittest import mock

import torch
from stillmotion.nodes.common import attention as attention_module
from stillmotion.nodes.common import fused
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


def product(*given, out, result, **more):
    """A product into an existing tensor, which is only written."""
    return 1, sum(map(occupied, [*tensors_of(given, more), result]))


LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
CUDA = {aten.native_group_norm: group_norm, aten.convolution: convolution, aten.index_copy_: store}
WRITTEN = {aten.bmm: product}  # with `out`


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
        counter = flop_registry.get(aten.addmm if kind is aten._addmm_activation else kind)
        if counter:
            self.flop += counter(*args, **(kwargs or {}), out_val=result)
        made = tensors_of(result)
        if self.inside or func.is_view or kind in FREE or not any(tensor.is_meta for tensor in made):
            return result
        self.count(kind, args[1:] if kind is aten.copy_ else args, kwargs, made)
        return result

    def count(self, kind, args, kwargs, made: list) -> None:
        """Count an operation, by itself or by its name. What is written in place is an argument and a result."""
        if "out" in (kwargs or {}):
            kernels, moved = WRITTEN[kind](*args, **kwargs, result=made[0])
        elif kind in CUDA:
            kernels, moved = CUDA[kind](*args, **(kwargs or {}), result=made[0])
        else:
            kernels, moved = 1, sum(map(occupied, [*tensors_of(args, kwargs), *made]))
        self.add(str(kind).removeprefix("aten."), kernels, moved)

    def add(self, name: str, kernels: int, moved: int) -> None:
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


class Kernels:
    """Stands in for the modules of Triton kernels: the same functions, which only count what they launch and move."""

    HALF = (torch.float16, torch.bfloat16)  # these as in `kernels_products.py`, which needs Triton
    MOST_KEYS = MOST_CHANNELS = 128

    def __init__(self, seen: Operations):
        self.seen = seen

    def made(self, name: str, given: list, results: list, kernels: int = 1) -> None:
        """Count a kernel that reads `given` and writes `results`."""
        self.seen.add(name, kernels, sum(map(occupied, tensors_of(given, results))))

    def add_norm(self, x, branch, gate, scale, shift, eps):
        total, normed = x if branch is None else torch.empty_like(x), torch.empty_like(x)
        self.made("add_norm", [x, branch, gate, scale, shift], [normed] if branch is None else [total, normed])
        return total, normed

    def norm_rotate(self, x, weight, eps, rotation, heads, ring, slots):
        out = torch.empty_like(x)
        self.made("norm_rotate", [x, weight, rotation, slots], [out])
        return out if ring is None else ring

    def gated_gelu(self, x):
        out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        self.made("gated_gelu", [x], [out])
        return out

    def add_bias(self, x, branch, bias):
        out = torch.empty_like(x)
        self.made("add_bias", [x, branch, bias], [out])
        return out

    def group_norm(self, x, groups, weight, bias, eps, add, silu):
        out = torch.empty_like(x)
        self.made("group_norm", [x, x, weight, bias, add], [out], kernels=3)
        return out

    def add_group_norm(self, x, branch, add, groups, weight, bias, eps):
        total, normed = torch.empty_like(x), torch.empty_like(x)
        self.made("add_group_norm", [x, branch, add, total, weight, bias], [total, normed], kernels=3)
        return total, normed

    def gated_linear(self, x, weight, bias):
        out = x.new_empty(*x.shape[:-1], len(weight) // 2)
        self.made("gated_linear", [x, weight, bias], [out])
        self.seen.flop += 2 * x.numel() * len(weight)
        return out

    def attend(self, q, out, sources, heads):
        # Keys that several queries share are views of one tensor, and so read once.
        self.made("attend", [q, sources], [out])
        self.seen.flop += sum(4 * q.numel() * k.shape[2] for k, _ in sources)


def attention(q, k, v, heads, **_):
    """The attention of the counted networks: one fused kernel."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return aten._scaled_dot_product_flash_attention(q, k, v)[0].transpose(1, 2).flatten(-2)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def counted(evaluate, triton: bool) -> Operations:
    """One call of `evaluate`, with or without the Triton kernels."""
    seen, functional = Operations(), torch.nn.functional
    with ExitStack() as stack:
        # PyTorch has one kernel for this on a GPU only; elsewhere it is made of several.
        stack.enter_context(mock.patch.object(functional, "rms_norm", seen.whole(functional.rms_norm)))
        stack.enter_context(mock.patch.object(fused, "applies_gelu", lambda x: True))
        if triton:
            kernels = Kernels(seen)
            for module in (fused, attention_module):
                for name in {"kernels_for", "products_for"} & vars(module).keys():
                    stack.enter_context(mock.patch.object(module, name, lambda x: kernels))
        stack.enter_context(torch.no_grad())
        stack.enter_context(seen)
        evaluate()
    return seen


def count(evaluate) -> dict:
    """Figures of one call of `evaluate` on a GPU."""
    seen, plain = counted(evaluate, True), counted(evaluate, False)
    return {"kernels": seen.kernels.total(), "gigabytes": round(seen.moved.total() / 1e9, 3),
            "matrix_teraflop": round(seen.flop / 1e12, 3),
            "without_triton": {"kernels": plain.kernels.total(), "gigabytes": round(plain.moved.total() / 1e9, 3)},
            "by_operation": {name: {"kernels": seen.kernels[name], "gigabytes": round(moved / 1e9, 3)}
                             for name, moved in seen.moved.most_common()}}
