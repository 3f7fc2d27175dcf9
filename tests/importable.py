"""Makes ComfyUI and the pack importable without a server: `from stillmotion.nodes.ddim import schedule`."""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]
FOLDERS = tempfile.TemporaryDirectory(prefix="stillmotion-tests-")  # models, input, output of the tests


def comfyui_root():
    """The ComfyUI chosen by tests/run.py, or the one next to this Python's virtual environment."""
    root = Path(os.environ.setdefault("STILLMOTION_COMFYUI", str(Path(sys.prefix).parent / "ComfyUI")))
    if not (root / "comfy").is_dir():
        raise RuntimeError(f"no ComfyUI at {root}: run `python tests/run.py`, which sets one up")
    return root


def use_comfyui(root):
    """Make ComfyUI importable, on the CPU if there is no GPU, with its own folders."""
    import torch

    sys.path.insert(0, str(root))
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    args.base_directory = FOLDERS.name


def import_pack():
    """Import the pack as the package `stillmotion`, as ComfyUI imports it under its own name."""
    spec = importlib.util.spec_from_file_location(
        "stillmotion", PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    sys.modules["stillmotion"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


sys.path += [str(PACK / "workflows" / "runner"), str(PACK / "workflows")]
use_comfyui(comfyui_root())
import_pack()
