"""The pack in the running Python, for scripts that need its engine but no server."""

import functools
import importlib.util
import sys

import host


def import_pack(comfyui, cpu=None):
    """Make ComfyUI importable and the pack importable as `stillmotion`; to be called once, in the host's Python.

    cpu None: on the GPU where there is one.
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
    """One module of nodes/common that imports nothing of ComfyUI or the pack, without the wait for those."""
    spec = importlib.util.spec_from_file_location(f"stillmotion_{name}", host.PACK / "nodes" / "common" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
