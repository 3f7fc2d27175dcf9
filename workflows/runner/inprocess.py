"""Import the pack into the running Python, for scripts that need its engine but no server."""

import functools
import importlib.util
import sys

import host


def import_pack(comfyui, cpu=None):
    """Make ComfyUI importable, and the pack as `stillmotion`. Call once, in the host's Python.

    cpu None: use the GPU if there is one.
    """
    sys.path.insert(0, str(comfyui))
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available() if cpu is None else cpu
    spec = importlib.util.spec_from_file_location(
        "stillmotion", host.PACK / "__init__.py", submodule_search_locations=[str(host.PACK)])
    sys.modules["stillmotion"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


@functools.cache
def common(name):
    """Import a module of nodes/common that needs neither ComfyUI nor the pack, without waiting for those to load."""
    spec = importlib.util.spec_from_file_location(f"stillmotion_{name}", host.PACK / "nodes" / "common" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
