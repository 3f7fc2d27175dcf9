"""Copied into the private host's site-packages: lets a CUDA build of torchvision import beside a CPU torch.

That build's native library then cannot load, and torchvision stops at import because it registers fake
kernels for two operators that nobody declared. Declaring them (without kernels) just before it does so is
enough: transforms and models work, and a call of `nms` gives torchvision's own clear error.
A `.pth` line imports this file at interpreter start; torch is not imported until torchvision is.
"""

import sys

WATCHED = "torchvision._meta_registrations"
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclareMissingOperators:
    """Import hook that acts once, on the first import of the module that needs the operators."""

    library = None  # torch forgets the declarations when this object dies

    def find_spec(self, name, path=None, target=None):
        if name == WATCHED:
            sys.meta_path.remove(self)
            import torch
            from torchvision import extension

            if not extension._has_ops():
                DeclareMissingOperators.library = torch.library.Library("torchvision", "DEF")
                for schema in SCHEMAS:
                    DeclareMissingOperators.library.define(schema)
        return None  # the usual finders load the module


sys.meta_path.insert(0, DeclareMissingOperators())
